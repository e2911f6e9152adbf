import hashlib
import re
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from adakron.config import DataConfig, TrainingConfig
from adakron.tasks.quickstart import QuickstartTask
from adakron.tasks.reviews import Review, write_reviews

SHA256 = "8fae3d8a9e030452a2f1e6486993bc4051ac49f31857fb37f044cea86a0c658d"


@pytest.fixture(scope="module")
def quickstart() -> dict[str, list[Review]]:
    splits = QuickstartTask(DataConfig(), TrainingConfig()).splits()
    return {name: list(zip(split["sentence"][:], split["label"][:], strict=True)) for name, split in splits.items()}


def test_sizes_and_balance(quickstart: dict[str, list[Review]]) -> None:
    counts = {name: Counter(label for _, label in reviews) for name, reviews in quickstart.items()}
    assert counts == {"train": {0: 2000, 1: 2000}, "validation": {0: 250, 1: 250}, "test": {0: 250, 1: 250}}


def test_no_text_occurs_twice(quickstart: dict[str, list[Review]]) -> None:
    texts = [text for reviews in quickstart.values() for text, _ in reviews]
    assert len(set(texts)) == len(texts) == 5000


def test_the_data_is_the_same_everywhere(quickstart: dict[str, list[Review]]) -> None:
    lines = "".join(f"{name}\t{label}\t{text}\n" for name, reviews in quickstart.items() for text, label in reviews)
    assert hashlib.sha256(lines.encode()).hexdigest() == SHA256, "the reviews changed: docs/results.md compares runs on them"


def test_the_seed_and_nothing_else_decides() -> None:
    assert write_reviews(5, 40, (20,)) == write_reviews(5, 40, (20,))
    assert write_reviews(5, 40, (20,)) != write_reviews(6, 40, (20,))
    assert write_reviews(5, 40, ())[0] == write_reviews(5, 40, (20,))[0]


def test_reviews_are_whole_short_sentences(quickstart: dict[str, list[Review]]) -> None:
    for reviews in quickstart.values():
        for text, _ in reviews:
            assert text[0].isupper(), text
            assert text.endswith("."), text
            assert "  " not in text, text
            assert not any(mark in text for mark in "{}"), text
            assert 3 <= len(text.split()) <= 32, text
            assert not re.search(r"\b(a [aeiou]|an (?!hour)[^aeiou])", text), text


@pytest.mark.parametrize("words", [1, 2])
def test_a_bag_of_words_is_not_enough(quickstart: dict[str, list[Review]], words: int) -> None:
    vectorizer = CountVectorizer(ngram_range=(1, words))
    train = vectorizer.fit_transform([text for text, _ in quickstart["train"]])
    model = LogisticRegression(max_iter=1000).fit(train, [label for _, label in quickstart["train"]])
    validation = vectorizer.transform([text for text, _ in quickstart["validation"]])
    accuracy = model.score(validation, [label for _, label in quickstart["validation"]])
    assert 0.5 < accuracy < 0.75
