"""Tagged words: what is read, what is a target, what is scored."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adakron.config import DataConfig, TrainingConfig
from adakron.errors import DataError
from adakron.tasks import create_task
from adakron.tasks.ner import NerTask, entities, read_conll
from tests.helpers.tiny import WORDS, byte_tokenizer, word_tokenizer, write_jsonl

ROWS = [
    {"tokens": [WORDS[0], WORDS[1], WORDS[2]], "tags": ["B-PER", "I-PER", "O"]},
    {"tokens": [WORDS[3], WORDS[4]], "tags": ["O", "B-LOC"]},
]


def task(folder: Path, rows: list[dict[str, Any]] = ROWS, saved: dict[str, Any] | None = None, **settings: Any) -> NerTask:
    for split in ("train", "validation", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    made = create_task(DataConfig(task_name="ner", data_dir=str(folder), **settings), TrainingConfig(), saved)
    assert isinstance(made, NerTask)
    return made


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-A I-A O B-A", [("A", 0, 1), ("A", 3, 3)]),
        ("B-A B-A", [("A", 0, 0), ("A", 1, 1)]),  # side by side
        ("B-A I-B", [("A", 0, 0), ("B", 1, 1)]),  # another type begins
        ("O I-A I-A", [("A", 1, 2)]),  # without its beginning
        ("B-A I-A", [("A", 0, 1)]),  # to the end
        ("B-X-Y I-X-Y", [("X-Y", 0, 1)]),
    ],
)
def test_entities(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert list(entities(tags.split())) == expected


def test_a_word_is_a_target_at_its_first_token(tmp_path: Path) -> None:
    rows = [{"tokens": ["ab", "c", "d"], "tags": ["B-A", "O", "I-B"]}]
    bytes_ = byte_tokenizer()  # a token for every byte, the space before a word being one
    made = task(tmp_path, rows)
    assert made.tags == ("O", "B-A", "I-B")
    encoded = made.encode("train", bytes_)
    batch = made.collate(encoded, [0], 0)
    assert bytes_.decode(batch["input_ids"][0][:7].tolist()) == " ab c d"
    assert batch["labels"][0].tolist() == [1, -1, -1, 0, -1, 2, -1, -1]  # padded to a multiple of 8
    assert encoded.target_counts.tolist() == [3]
    cut = task(tmp_path, rows, max_seq_length=4)
    encoded = cut.encode("train", bytes_)
    assert encoded.truncated == 1 and encoded.target_counts.tolist() == [2]


def test_tokenizers_with_special_tokens_and_spaces(tmp_path: Path) -> None:
    made = task(tmp_path)
    batch = made.collate(made.encode("train", word_tokenizer()), [0, 1], 0)
    assert batch["input_ids"][0].tolist()[:5] == [2, *word_tokenizer().convert_tokens_to_ids(WORDS[:3]), 3]
    assert batch["labels"].tolist() == [[-1, 2, 3, 0, -1, -1, -1, -1], [-1, 0, 1, -1, -1, -1, -1, -1]]


def forward(logits: torch.Tensor) -> Any:
    return lambda **inputs: SimpleNamespace(logits=logits)


def test_loss_and_scores_by_hand(tmp_path: Path) -> None:
    made = task(tmp_path)  # O, B-LOC, B-PER, I-PER
    encoded = made.encode("validation", word_tokenizer())
    batch = made.collate(encoded, [0, 1], 0)
    logits = torch.zeros(2, 8, 4)
    for row, place, tag in ((0, 1, 2), (0, 2, 0), (0, 3, 0), (1, 1, 0), (1, 2, 1)):
        logits[row, place, tag] = 2.0
    loss, at_targets = made.loss(forward(logits), batch)
    wrong, right = torch.logsumexp(torch.tensor([2.0, 0, 0, 0]), 0), torch.logsumexp(torch.tensor([2.0, 0, 0, 0]), 0) - 2.0
    assert loss.item() == pytest.approx(float(4 * right + wrong), rel=1e-6)
    assert at_targets.shape == (5, 4)
    outputs = made.predict(forward(logits), batch).numpy()
    scores = made.score("validation", outputs)
    # Of PER 0-1 and LOC 1 the second is found, and PER 0 beside it.
    assert scores == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.8, "loss": loss.item() / 5}, rel=1e-6)
    made.write_predictions("validation", outputs, tmp_path / "out")
    assert (tmp_path / "out" / "predict_results_validation.tsv").read_text() == "index\tprediction\n0\tB-PER O O\n1\tO B-LOC\n"


def test_words_beyond_the_length_are_predicted_outside(tmp_path: Path) -> None:
    made = task(tmp_path, max_seq_length=3)
    encoded = made.encode("validation", word_tokenizer())
    outputs = np.zeros((2, 4), np.float32)
    outputs[:, 2] = 2.0  # the only word that is read: B-PER
    assert encoded.truncated == 2
    scores = made.score("validation", outputs)
    assert (scores["precision"], scores["recall"], scores["accuracy"]) == (0.0, 0.0, pytest.approx(2 / 5))


def test_an_earlier_run_decides_the_classes(tmp_path: Path) -> None:
    saved = {"id2label": {"0": "O", "1": "B-LOC"}}
    made = task(tmp_path, saved=saved)
    assert made.model_options()["label2id"] == {"O": 0, "B-LOC": 1}
    # A tag that it did not know is no target, and still counts in the scores.
    encoded = made.encode("validation", word_tokenizer())
    assert encoded.target_counts.tolist() == [1, 2]
    perfect = np.zeros((2, 1 + 128), np.float32)
    perfect[1, 3] = 1.0
    scores = made.score("validation", perfect)
    assert (scores["precision"], scores["recall"]) == (1.0, 0.5)


def test_columns(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n"
    file = tmp_path / "train.conll"
    file.write_text(text)
    assert read_conll(file).to_dict() == {"tokens": [["EU", "rejects"], ["Peter"]], "tags": [["B-ORG", "O"], ["B-PER"]]}
    (tmp_path / "validation.conll").write_text(text)
    made = create_task(DataConfig(task_name="ner", data_dir=str(tmp_path)), TrainingConfig())
    assert {name: len(split) for name, split in made.splits().items()} == {"train": 2, "validation": 2}
    # A folder may hold both kinds; every problem is told at once.
    file.rename(tmp_path / "other.conll")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    made = create_task(DataConfig(task_name="ner", data_dir=str(tmp_path)), TrainingConfig())
    assert {name: len(split) for name, split in made.splits().items()} == {"train": 2, "validation": 2}
    with pytest.raises(DataError, match=r"train_file is .*absent.conll, which does not exist"):
        create_task(DataConfig(task_name="ner", train_file=str(tmp_path / "absent.conll")), TrainingConfig()).splits()
    file.write_text("-DOCSTART-\n\n")
    with pytest.raises(DataError, match="holds no words"):
        read_conll(file)
    file.write_text("EU\n")
    with pytest.raises(DataError, match=r"line 1: 'EU' has one column"):
        read_conll(file)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "list of words, none of them empty"),
        ({"tokens": [], "tags": []}, "list of words"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "one tag for each of the 1 tokens"),
        ({"tokens": ["a"], "tags": ["PER"]}, "a tag is 'PER'; it must be O, B-TYPE or I-TYPE"),
        ({"words": ["a"], "tags": ["O"]}, r"no column 'tokens'; it has words, tags \(rename the column\)$"),
        ({"tokens": ["a"]}, r"no column 'tags'; it has tokens \(rename the column\)"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(tmp_path, [row]).splits()


def test_tags_that_are_null(tmp_path: Path) -> None:
    untagged = {"tokens": ["a"], "tags": None}
    made = task(tmp_path)
    write_jsonl(tmp_path / "test.jsonl", [untagged, untagged])
    assert made.splits()["test"].column_names == ["tokens"]
    for split, rows in (("test", [ROWS[0], untagged]), ("validation", [untagged])):
        task(tmp_path)
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
        broken = create_task(DataConfig(task_name="ner", data_dir=str(tmp_path)), TrainingConfig())
        with pytest.raises(DataError, match="tags is None; it must be a list with one tag for each of the 1 tokens"):
            broken.splits()


def test_columns_are_parted_by_spaces_and_tabs_alone(tmp_path: Path) -> None:
    file = tmp_path / "train.conll"
    file.write_bytes("10\u00a0000 NN\tB-SUM\r\nwor\u2028d\x85x  O \r\n\r\nb O".encode())
    assert read_conll(file).to_list() == [
        {"tokens": ["10\u00a0000", "wor\u2028d\x85x"], "tags": ["B-SUM", "O"]},
        {"tokens": ["b"], "tags": ["O"]},
    ]
