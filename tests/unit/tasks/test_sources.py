import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from adakron.config import DataConfig
from adakron.errors import DataError
from adakron.tasks.classification import SPLITS
from adakron.tasks.sources import RawSplit, load_raw_splits

ROWS = [{"sentence": "one, two", "label": 1}, {"sentence": 'a "b"', "label": 0}]
THREE = ("train", "validation", "test")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(splits: tuple[str, ...] = THREE, **settings: Any) -> dict[str, RawSplit]:
    texts: dict[str, Any] = {name: str(value) for name, value in settings.items()}
    return load_raw_splits(DataConfig(task_name="text", **texts), splits)


def error(**settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(**settings)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "shards"])
def test_a_folder_in_every_format(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.{suffix}"
        if suffix == "jsonl":
            write(path, lines(ROWS))
        elif suffix == "json":
            write(path, json.dumps(ROWS, indent=1))
        elif suffix == "csv":
            write(path, 'sentence,label\n"one, two",1\n"a ""b""",0\n')
        elif suffix == "tsv":
            write(path, 'sentence\tlabel\none, two\t1\na "b"\t0\n')
        elif suffix == "parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(path)
        else:
            for number, row in enumerate(ROWS):
                datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{split}-0000{number}-of-00002.parquet")
    loaded = load(data_dir=tmp_path)
    assert list(loaded) == ["train", "validation"]
    assert loaded["train"].dataset["sentence"][:] == ["one, two", 'a "b"']
    assert [int(label) for label in loaded["train"].dataset["label"]] == [1, 0]


def test_cells_are_taken_literally(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "\ufefftext,label\nNA,007\nnull,\n,1e3\n")
    write(tmp_path / "test.tsv", 'text\tlabel\n"open\t1\n1984\t0\n')
    loaded = load(data_dir=tmp_path)
    assert loaded["train"].dataset["text"][:] == ["NA", "null", ""]
    assert loaded["train"].dataset["label"][:] == ["007", "", "1e3"]
    assert loaded["test"].dataset["text"][:] == ['"open', "1984"]


def test_rows_are_counted_as_the_loader_counts_them(tmp_path: Path) -> None:
    long = "x " * 100_000
    write(tmp_path / "train.csv", f't,label\r\n\r\n  \r\n"a, ""b""\nc",0\r\n{long},1\r\n"d" e,\r\n,\r\n')
    write(tmp_path / "test.csv", 't\n"a,b"\n\n""\nc')
    limit = csv.field_size_limit()
    loaded = load(data_dir=tmp_path)
    assert loaded["train"].dataset["t"][:] == ['a, "b"\nc', long, "d e", ""]
    assert loaded["train"].dataset["label"][:] == ["0", "1", "", ""]
    assert loaded["test"].dataset["t"][:] == ["a,b", "", "c"]
    assert csv.field_size_limit() == limit


def test_files_win_over_the_folder(tmp_path: Path) -> None:
    for name in ("train", "validation", "other"):
        write(tmp_path / f"{name}.jsonl", lines([{"sentence": name, "label": 0}]))
    loaded = load(data_dir=tmp_path, train_file=tmp_path / "other.jsonl")
    assert {split: raw.dataset["sentence"][0] for split, raw in loaded.items()} == {"train": "other", "validation": "validation"}


def test_mnli_has_two_validation_splits(tmp_path: Path) -> None:
    for name in ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"):
        write(tmp_path / f"{name}.jsonl", lines([{"premise": name}]))
    loaded = load(SPLITS, data_dir=tmp_path)
    assert {split: raw.dataset["premise"][0] for split, raw in loaded.items()} == {
        "train": "train", "validation": "validation_matched", "validation_mismatched": "validation_mismatched",
        "test": "test_matched", "test_mismatched": "test_mismatched",
    }  # fmt: skip
    assert list(load(THREE, data_dir=tmp_path)) == ["train"]


def test_nothing_is_printed_and_the_librarys_settings_are_put_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", lines(ROWS))
    write(tmp_path / "bad.jsonl", "{")
    datasets.enable_progress_bars()
    level = logging.getLogger("datasets").level
    load(train_file=tmp_path / "train.jsonl")
    error(train_file=tmp_path / "bad.jsonl")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert logging.getLogger("datasets").level == level


def test_a_cache_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl", lines(ROWS))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "train.jsonl" / "cache")
    assert load(data_dir=tmp_path)["train"].dataset["sentence"][:] == ["one, two", 'a "b"']


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", lines(ROWS))
    load(train_file=path)
    write(path, lines([*ROWS, {"sentence": "new", "label": 1}]))
    assert load(train_file=path)["train"].dataset["sentence"][2] == "new"


def test_no_source_at_all() -> None:
    assert "task text has no data; give --train_file and --validation_file, or --data_dir" in error()


def test_every_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "trian.jsonl", lines(ROWS))
    message = error(train_file=tmp_path / "train.jsonl", validation_file=tmp_path / "no" / "x.csv", test_file=tmp_path)
    first, second, third = message.split("\n")
    assert "train_file is " in first and "does not exist; " in first and "holds trian.jsonl (set --train_file)" in first
    assert "x.csv" in second and "nor does the folder" in second
    assert "test_file is " in third and "is a folder" in third


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    assert "which is missing; it must be a folder (set --data_dir)" in error(data_dir=tmp_path / "no")
    assert "which holds nothing; it must hold train and validation" in error(data_dir=tmp_path)
    for name in ("train.jsonl", "train.csv"):
        write(tmp_path / name, lines(ROWS))
    assert "holds several files for train: train.jsonl, train.csv; keep one, or name one by its flag" in error(data_dir=tmp_path)
    assert "which is a file; it must be a folder" in error(data_dir=tmp_path / "train.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"t": "x"}\n{"t": "y"\n{"t": "z"}\n', "a.jsonl, line 2: "),
        ("a.jsonl", '{"t": "x"}\n[1, 2]\n', "a.jsonl, line 2: a JSON list, not an object; every line must be one JSON object"),
        ("a.jsonl", b'{"t": "x"}\n\n{"t": "caf\xe9"}\n', "a.jsonl, line 3: byte 11 (0xe9) is not UTF-8; convert the file to UTF-8"),
        ("a.json", '[{"t": "x"},\n {"t": "y"\n "u": 1}]', "a.json, line 3: "),
        ("a.csv", b"t,label\nx,0\n\xff,1\n", "a.csv, line 3: byte 1 (0xff) is not UTF-8"),
        (
            "a.csv",
            "t,label\nx,0\ny,1,2\n",
            "a.csv line 3 has 3 fields, the header has 2; every row must have as many as the header (quote cells that hold a comma",
        ),
        ("a.csv", "t,t\nx,0\n", "a.csv has the column 't' twice; its first line must name every column once"),
        ("a.csv", "text,title,label\na,b,c,d\ne,f,g,h\n", "a.csv line 2 has 4 fields, the header has 3 (2 such rows in all); every"),
        ("a.csv", "t,label\nx,0,\n", "a.csv line 2 has 3 fields, the header has 2;"),
        ("a.csv", 't,label\n\n"x\ny",0\nz\n', "a.csv line 5 has 1 field, the header has 2;"),
        ("a.csv", 't,label\n"x,0\ny,1\n', "a.csv line 2 has 1 field, the header has 2;"),
        ("a.tsv", 't\tlabel\n"x\ty"\t0\n', "a.tsv line 2 has 3 fields, the header has 2; every row must have as many as the header (no"),
        ("a.csv", ",t,label\n0,x,0\n", "a.csv has no name for column 1; its first line must name every column once"),
        ("a.jsonl", '{"t": "x"}\n{"t": %s}\n{"t": "y"}\n' % ("9" * 5000), "a.jsonl, line 2: a whole number of 5000 digits; at most 308"),
        ("a.csv", "t,label\n", "a.csv holds no rows; it must hold at least one example"),
        ("a.parquet", "not parquet", "a.parquet cannot be read as parquet: "),
        ("a.jsonl", "", "a.jsonl is empty; it must hold at least one example"),
        ("a.txt", "x", "a.txt has the ending '.txt'; it must be one of .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_unreadable_files_say_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    assert message in error(train_file=write(tmp_path / name, content))


def test_problems_of_several_files_are_told_at_once(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "a.jsonl", "{"), write(tmp_path / "b.csv", "t,label\n")
    assert len(error(train_file=train, validation_file=validation).split("\n")) == 2


def test_glue_without_the_hub_names_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"GLUE's sst2 cannot be loaded from the hub .*: Couldn't reach the hub; .*--train_file .*--data_dir"
    ):
        load_raw_splits(DataConfig(task_name="sst2"), THREE, hub_task="sst2")


def test_mnli_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(*names: str) -> datasets.DatasetDict:
        asked.append(names)
        splits = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
        return datasets.DatasetDict({split: datasets.Dataset.from_dict({"premise": [split]}) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    loaded = load_raw_splits(DataConfig(task_name="mnli"), SPLITS, hub_task="mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert {split: raw.dataset["premise"][0] for split, raw in loaded.items()} == {
        "train": "train", "validation": "validation_matched", "validation_mismatched": "validation_mismatched",
        "test": "test_matched", "test_mismatched": "test_mismatched",
    }  # fmt: skip
