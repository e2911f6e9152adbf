import threading
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from adakron.data import encoding
from adakron.data.encoding import encode_texts
from adakron.errors import ConfigError
from tests.helpers.letters import VOCABULARY, letter_tokenizer


def rows_of(table: encoding.TokenTable, name: str = "input_ids") -> list[list[int]]:
    return [table.features[name][a:b].tolist() for a, b in zip(table.offsets, table.offsets[1:], strict=False)]


def texts(*values: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(values)})


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever texts are really tokenised."""
    calls: list[int] = []
    original = encoding._tokenise

    def counted(*args: Any) -> encoding.TokenTable:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(encoding, "_tokenise", counted)
    return calls


def test_flat_arrays_hold_what_the_tokenizer_says(tmp_path: Path) -> None:
    table = encode_texts(texts("a b", "", "c"), ["text"], letter_tokenizer(), 8, tmp_path)
    assert rows_of(table) == [[2, 4, 5, 3], [2, 3], [2, 6, 3]]
    assert table.features["input_ids"].dtype == np.int32
    assert table.offsets.dtype == np.int64
    assert table.truncated == 0


def test_pairs_are_joined_and_the_longer_text_is_cut(tmp_path: Path) -> None:
    pair = datasets.Dataset.from_dict({"one": ["a"], "two": ["b c d e f"]})
    settings = letter_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    table = encode_texts(pair, ["one", "two"], settings, 7, tmp_path)
    assert rows_of(table) == [[2, 4, 3, 5, 6, 7, 3]]
    assert rows_of(table, "token_type_ids") == [[0, 0, 0, 1, 1, 1, 1]]
    assert table.truncated == 1


def test_token_types_are_kept_only_where_the_tokenizer_makes_them(tmp_path: Path) -> None:
    without = encode_texts(texts("a"), ["text"], letter_tokenizer(model_input_names=["input_ids", "attention_mask"]), 8, tmp_path)
    assert set(without.features) == {"input_ids"}


def test_truncated_counts_longer_inputs_and_not_those_that_just_fit(tmp_path: Path) -> None:
    table = encode_texts(texts("a b c", "a b c d", "a b c d e f", "a"), ["text"], letter_tokenizer(), 5, tmp_path)
    assert table.truncated == 2
    assert np.diff(table.offsets).tolist() == [5, 5, 5, 3]


def test_the_tokenizers_own_limit_wins_where_it_is_lower(tmp_path: Path) -> None:
    table = encode_texts(texts("a b c d e f"), ["text"], letter_tokenizer(model_max_length=6), 128, tmp_path)
    assert np.diff(table.offsets).tolist() == [6]
    assert table.truncated == 1


def test_a_limit_without_room_for_text_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_seq_length is 2; .* need 3 \(set --max_seq_length 3 or more\)"):
        encode_texts(texts("a"), ["text"], letter_tokenizer(), 2, tmp_path)


def test_an_empty_text_without_special_tokens_becomes_one_token(tmp_path: Path) -> None:
    table = encode_texts(texts("a b", "", "c", ""), ["text"], letter_tokenizer(special=False, eos_token="j"), 8, tmp_path)
    end = VOCABULARY.index("j")
    assert rows_of(table) == [[4, 5], [end], [6], [end]]


def test_more_rows_than_are_tokenised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = ["a", "b c", "d", "", "e f g h"]
    whole = encode_texts(texts(*values), ["text"], letter_tokenizer(), 5, tmp_path / "whole")
    monkeypatch.setattr(encoding, "_ROWS_AT_ONCE", 2)
    parts = encode_texts(texts(*values), ["text"], letter_tokenizer(), 5, tmp_path / "parts")
    assert rows_of(parts) == rows_of(whole)
    assert parts.truncated == whole.truncated == 1


def test_the_same_texts_are_tokenised_once(tmp_path: Path, built: list[int]) -> None:
    settings = letter_tokenizer()
    first = encode_texts(texts("a b c", "d"), ["text"], settings, 4, tmp_path)
    settings("a", padding="max_length", max_length=7, truncation=True)  # leaves its traces in the tokenizer's state
    # Other chunks, another index: the same texts.
    joined = datasets.concatenate_datasets([texts("d"), texts("a b c")]).select([1, 0])
    second = encode_texts(joined, ["text"], settings, 4, tmp_path)
    assert len(built) == 1
    assert rows_of(first) == rows_of(second) == [[2, 4, 5, 3], [2, 7, 3]]
    assert first.truncated == second.truncated == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_whatever_changes_the_tokens_changes_the_key(tmp_path: Path, built: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "other": ["a", "b"]})
    encode_texts(data, ["text"], letter_tokenizer(), 8, tmp_path)
    encode_texts(data, ["text"], letter_tokenizer(), 7, tmp_path)
    encode_texts(data.select([1, 0]), ["text"], letter_tokenizer(), 8, tmp_path)
    encode_texts(data.select([0]), ["text"], letter_tokenizer(), 8, tmp_path)
    encode_texts(data, ["text", "other"], letter_tokenizer(), 8, tmp_path)
    encode_texts(data, ["text"], letter_tokenizer(vocabulary=[*VOCABULARY, "k"]), 8, tmp_path)
    encode_texts(data, ["text"], letter_tokenizer(special=False), 8, tmp_path)
    monkeypatch.setattr(encoding, "FORMAT_VERSION", 2)
    encode_texts(data, ["text"], letter_tokenizer(), 8, tmp_path)
    assert len(built) == 8


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "rows"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path: Path, built: list[int], damage: str, caplog: pytest.LogCaptureFixture) -> None:
    values = ["a b c"] * 50
    encode_texts(texts(*values), ["text"], letter_tokenizer(), 8, tmp_path)
    (file,) = tmp_path.glob("*.npz")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    elif damage == "foreign":
        file.write_text("not an archive", encoding="utf-8")
    else:
        np.savez(file, offsets=np.arange(3), truncated=np.int64(0), input_ids=np.zeros(2, np.int32))
    with caplog.at_level("WARNING", logger="adakron"):
        table = encode_texts(texts(*values), ["text"], letter_tokenizer(), 8, tmp_path)
    assert rows_of(table) == [[2, 4, 5, 6, 3]] * 50
    assert len(built) == 2
    assert "tokenising again" in caplog.text
    encode_texts(texts(*values), ["text"], letter_tokenizer(), 8, tmp_path)
    assert len(built) == 2


def test_a_folder_that_cannot_be_written_to_means_no_cache(tmp_path: Path, built: list[int]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for _ in range(2):
        assert rows_of(encode_texts(texts("a"), ["text"], letter_tokenizer(), 8, tmp_path / "file" / "cache")) == [[2, 4, 3]]
    assert len(built) == 2


def test_a_lock_held_for_too_long_does_not_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_LOCK_SECONDS", 0.05)
    path = tmp_path / "held.npz"
    table = encode_texts(texts("a"), ["text"], letter_tokenizer(), 8, tmp_path)
    with encoding._lock(path):
        results: list[encoding.TokenTable] = []
        other = threading.Thread(target=lambda: results.append(encoding.cached(path, 1, lambda: table)))
        other.start()
        other.join(timeout=30)
        assert rows_of(results[0]) == [[2, 4, 3]]


def test_who_starts_together_tokenises_once(tmp_path: Path, built: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = encoding._tokenise

    def slow(*args: Any) -> encoding.TokenTable:
        time.sleep(0.3)
        return counted(*args)

    monkeypatch.setattr(encoding, "_tokenise", slow)
    results: list[encoding.TokenTable] = []

    def work() -> None:
        results.append(encode_texts(texts("a b"), ["text"], letter_tokenizer(), 8, tmp_path))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(built) == 1
    assert [rows_of(table) for table in results] == [[[2, 4, 5, 3]]] * 3
