"""Every bad input is one clear error before a process group exists, and leaves nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from adakron import run_folder
from adakron.errors import AdaKronError, ConfigError
from adakron.launcher import World
from adakron.run_lock import LOCK_FILE, RunLock
from launch import train
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]

Prepare = Callable[[Path, Path], list[str]]


def rows(*labels: object) -> list[dict[str, object]]:
    return [{"sentence": f"good {index}", "label": label} for index, label in enumerate(labels)]


def data_with(**files: object) -> Prepare:
    """A prepare function that writes split files and points --data_dir at them."""

    def prepare(folder: Path, model: Path) -> list[str]:
        for name, content in files.items():
            tiny.write_jsonl(folder / f"{name}.jsonl", content)  # type: ignore[arg-type]
        return ["--data_dir", str(folder)]

    return prepare


GOOD = rows(0, 1, 0, 1)

CASES: dict[str, tuple[Prepare, str]] = {
    "missing folder": (lambda folder, model: ["--data_dir", str(folder / "nowhere")], "nowhere"),
    "missing file": (
        lambda folder, model: ["--train_file", str(folder / "no.csv"), "--validation_file", str(folder / "no.csv")],
        r"no\.csv",
    ),
    "missing column": (data_with(train=[{"text": "good", "label": 1}], validation=GOOD), "sentence.*text"),
    "label out of range": (data_with(train=rows(0, 1, 7), validation=GOOD), "7"),
    "label no number": (data_with(train=rows(0, 1, "maybe"), validation=GOOD), "maybe"),
    "empty split": (data_with(train=[], validation=GOOD), "train"),
    "no validation": (data_with(train=GOOD), "--validation_file"),
    "unknown task": (lambda folder, model: ["--task_name", "sst"], "sst2"),
    "no model": (
        lambda folder, model: ["--data_dir", str(folder / "d"), "--model_name_or_path", str(folder / "m")],
        "--model_name_or_path",
    ),
    "json contradicts": (lambda folder, model: ["--deepspeed", write_json(folder, {"train_batch_size": 7})], "train_batch_size"),
    "json unknown key": (lambda folder, model: ["--deepspeed", write_json(folder, {"zero_optimisation": {}})], "zero_optimisation"),
    "no json": (lambda folder, model: ["--deepspeed", str(folder / "none.json")], r"none\.json"),
    "fp16 on a CPU": (lambda folder, model: ["--deepspeed", str(ROOT / "ds_configs" / "zero2_fp16.json")], "fp16"),
    "output is a file": (lambda folder, model: ["--output_dir", str(write_file(folder))], "is a file"),
    "unknown metric": (data_with(train=GOOD, validation=GOOD), "metric_for_best_model is bleu"),
    "no module matches": (data_with(train=GOOD, validation=GOOD), "target_modules"),
    "nothing to train": (lambda folder, model: ["--do_eval"], "--do_train"),
}
EXTRA = {"unknown metric": ["--metric_for_best_model", "bleu"], "no module matches": ["--target_modules", r".*\.attention\.nothing"]}


def write_json(folder: Path, content: object) -> str:
    file = folder / "bad.json"
    file.write_text(json.dumps(content))
    return str(file)


def write_file(folder: Path) -> Path:
    file = folder / "file"
    file.write_text("")
    return file


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_error(name, tmp_path, tiny_bert, tiny_data, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare, said = CASES[name]
    folder = tmp_path / "input"
    folder.mkdir()
    # Some CPUs compute in fp16; what is tested is one that does not.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    if name == "no model":
        tiny.write_classification(folder / "d")
    base = ["--model_name_or_path", str(tiny_bert), "--task_name", "sst2", "--output_dir", str(tmp_path / "out")]
    if name not in ("missing file",):
        base += ["--data_dir", str(tiny_data)]
    with pytest.raises(AdaKronError, match=said):
        train.main([*base, *prepare(folder, tiny_bert), *EXTRA.get(name, [])], World())
    assert not dist.is_initialized()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_a_run_writes_is_refused_even_for_overwriting(tmp_path, tiny_bert, tiny_data):
    run_folder.write_json(tmp_path / run_folder.RUN_FILE, {})
    flags = ["--model_name_or_path", str(tiny_bert), "--task_name", "sst2", "--data_dir", str(tiny_data)]
    with RunLock(tmp_path), pytest.raises(ConfigError, match="is being written by process"):
        train.main([*flags, "--output_dir", str(tmp_path), "--overwrite_output_dir"], World())
    assert not dist.is_initialized()
    assert {path.name for path in tmp_path.iterdir()} == {run_folder.RUN_FILE, LOCK_FILE}
