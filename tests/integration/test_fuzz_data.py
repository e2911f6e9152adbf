"""Hostile data files in all formats: refused in one paragraph, or accepted; never waited for, never run."""

import pytest

from launch import train
from tests.helpers.fuzzing import Case, cases, generator, pick, run_case
from tests.helpers.hostile import data_files

pytestmark = pytest.mark.timeout(60)

NAMED = ("train", "data", "validation", "file", "column", "label", "sentence", "split", "class")


def arguments(rng, model, good, files):
    """The flags of a run on these files, by split."""
    flags = ["--model_name_or_path", str(model)]
    if rng.random() < 0.5:
        flags += ["--task_name", "sst2"]
    else:
        flags += ["--task_name", "text"]
        flags += ["--text_column", "sentence"] if rng.random() < 0.5 else []
        flags += ["--problem", pick(rng, ("classification", "regression"))] if rng.random() < 0.3 else []
    return flags + [part for split, file in ({"train": good, "validation": good} | files).items() for part in (f"--{split}_file={file}",)]


@cases(190)
def test_data_files(index, tiny_bert, tmp_path, monkeypatch, offline):
    rng = generator("data", index)
    home = tmp_path / "home"
    home.mkdir()
    good = tmp_path / "good.jsonl"
    good.write_bytes(data_files.encoded(data_files.good_rows(), ".jsonl"))
    split = pick(rng, ("train", "train", "validation", "test"))
    file, what = data_files.hostile(rng, tmp_path, "hostile")
    flags = arguments(rng, tiny_bert, good, {split: file})
    if split == "test":
        flags += ["--do_train", "--do_predict"]
    run_case(Case(train, flags, (*NAMED, "hostile"), f"{what} as {file.name!r}"), home, monkeypatch)
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.parametrize("suffix", data_files.SUFFIXES)
@pytest.mark.parametrize("kind", data_files.LARGE)
def test_large_data_files(kind, suffix, tiny_bert, tmp_path, monkeypatch, offline):
    home = tmp_path / "home"
    home.mkdir()
    file = tmp_path / f"hostile{suffix}"
    file.write_bytes(data_files.LARGE[kind](suffix))
    flags = arguments(generator("large", 0), tiny_bert, file, {})
    run_case(Case(train, flags, (*NAMED, "hostile"), kind), home, monkeypatch)
    file.unlink()


@cases(20)
def test_data_folders(index, tiny_bert, tmp_path, monkeypatch, offline):
    rng = generator("folder", index)
    home, folder = tmp_path / "home", tmp_path / "data"
    home.mkdir()
    folder.mkdir()
    for split in ("train", "validation", "test"):
        if rng.random() < 0.8:
            data_files.hostile(rng, folder, pick(rng, (split, split, f"{split}-00000-of-00002", f"{split}_matched")))
    flags = ["--model_name_or_path", str(tiny_bert), "--task_name", pick(rng, ("sst2", "mnli", "text")), "--data_dir", str(folder)]
    run_case(Case(train, flags, NAMED, ", ".join(sorted(path.name for path in folder.iterdir()))), home, monkeypatch)
