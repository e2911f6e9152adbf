"""Runs on ranks that run out of memory: `--auto_micro_batch` before training, a clear end in the middle of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny
from tests.helpers.launch import Finished, deepspeed, logged

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(600)]

STEP = 32
"""Examples of a step on all ranks."""

AUTO = ("--auto_micro_batch", "--per_device_train_batch_size", "16")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, short texts in `data`, long ones in `long`."""
    home = tmp_path_factory.mktemp("memory")
    tiny.save_tiny_bert(home / "model", dropout=0.1, positions=512)
    tiny.write_classification(home / "data", train=70)
    rows = [{"sentence": text, "label": len(text) % 2} for text in tiny.sentences(160, longest=400)]
    tiny.write_jsonl(home / "long" / "train.jsonl", rows)
    return home


def train(inputs: Path, out: Path, *more: str, limit: dict[str, Any] | None = None, json_name: str = "zero2_fp32") -> Finished:
    program = ["launch/train.py"] if limit is None else ["--module", "tests.helpers.short_of_memory"]
    return deepspeed(
        *program, "--deepspeed", f"ds_configs/{json_name}.json", "--model_name_or_path", str(inputs / "model"), "--task_name", "sst2",
        "--data_dir", str(inputs / "data"), "--bottleneck_dim", "8", "--do_train", "--eval_strategy", "no", "--save_strategy", "no",
        "--logging_steps", "1", "--max_steps", "4", "--output_dir", str(out), *more, ranks=2, env={"LIMIT": json.dumps(limit)},
    )  # fmt: skip


def by_hand(size: int, examples: int = STEP) -> tuple[str, ...]:
    return "--per_device_train_batch_size", str(size), "--global_batch_size", str(examples)


def found(out: Path) -> dict[str, int]:
    fit: dict[str, int] = json.loads((out / "run.json").read_text())["micro_batch"]
    return fit


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    for name in ("train/loss", "train/grad_norm", "train/learning_rate"):
        assert logged(one, name) == logged(other, name), name


@pytest.mark.parametrize(
    ("json_name", "limit", "more"),
    [
        ("zero0_fp32", {"where": "backward", "rank": 1}, ()),
        # Torch's own stream, so that the rehearsal's draws would show.
        ("zero2_fp32", {"where": "forward", "rank": 0}, ("--dropout_masks", "framework")),
        ("zero2", {"where": "backward"}, ("--gradient_checkpointing",)),
        # Experts drawn anew for every micro-batch.
        ("zero2_fp32", {"where": "backward", "rank": 1}, ("--method", "madakron", "--num_experts", "2")),
        ("zero3_fp32", {"where": "forward", "rank": 0}, ("--dropout_masks", "framework")),
        ("zero3", {"where": "backward", "rank": 1}, ("--gradient_checkpointing",)),
    ],
)
def test_the_run_is_that_of_the_micro_batch_it_found(tmp_path, inputs, json_name, limit, more):
    """Also where one rank alone is short of memory, in the middle of a pass."""
    auto = train(inputs, tmp_path / "auto", *AUTO, *more, limit={"rows": 4, **limit}, json_name=json_name)
    assert auto.returncode == 0, auto.output
    assert "micro-batch 4 instead of 16, 4 passes a step" in auto.stderr
    assert found(tmp_path / "auto") == {"asked": 16, "taken": 4, "passes": 4}
    assert ("results are those of --per_device_train_batch_size 4" in auto.stderr) == ("framework" in more or "madakron" in more)
    hand = train(inputs, tmp_path / "hand", *by_hand(4), *more, json_name=json_name)
    assert hand.returncode == 0, hand.output
    assert_same_run(tmp_path / "auto", tmp_path / "hand")


@pytest.mark.parametrize("json_name", ["zero2_fp32", "zero3_fp32"])
def test_an_imposed_limit_on_memory_is_kept(tmp_path, inputs, json_name):
    # Attention written out, which takes memory with the square of the length: with kernels all 64 texts fit.
    long = ("--data_dir", str(inputs / "long"), "--max_seq_length", "512", "--max_steps", "2", "--unpad", "no", "--kernels", "torch")
    asked = ("--per_device_train_batch_size", "64", "--auto_micro_batch")
    auto = train(inputs, tmp_path / "auto", *long, *asked, limit={"mib": 800}, json_name=json_name)
    assert auto.returncode == 0, auto.output
    taken = found(tmp_path / "auto")["taken"]
    assert taken in (8, 16, 32)
    hand = train(inputs, tmp_path / "hand", *long, *by_hand(taken, 128), json_name=json_name)
    assert hand.returncode == 0, hand.output
    assert_same_run(tmp_path / "auto", tmp_path / "hand")


def test_a_resumed_run_finds_a_micro_batch_of_its_own(tmp_path, inputs):
    saving = ("--save_strategy", "steps", "--save_steps", "2")
    whole = train(inputs, tmp_path / "whole", *by_hand(4), *saving, json_name="zero3_fp32")
    assert whole.returncode == 0, whole.output
    resume = ("--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2"))
    rest = train(
        inputs, tmp_path / "rest", *AUTO, *saving, *resume, limit={"rows": 4, "where": "backward", "rank": 1}, json_name="zero3_fp32"
    )
    assert rest.returncode == 0, rest.output
    assert found(tmp_path / "rest")["taken"] == 4
    assert (tmp_path / "rest" / "adapter_model.safetensors").read_bytes() == (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()
    assert logged(tmp_path / "rest") == logged(tmp_path / "whole")[2:]


def test_one_example_that_does_not_fit_is_one_clear_error(tmp_path, inputs):
    finished = train(inputs, tmp_path / "run", *AUTO, limit={"rows": 0, "where": "forward", "rank": 1}, json_name="zero3_fp32")
    assert finished.returncode != 0
    assert finished.stderr.count("error: one example of ") == 1, finished.output
    assert "--gradient_checkpointing" in finished.stderr
    assert "Traceback" not in finished.output


@pytest.mark.parametrize("json_name", ["zero2_fp32", "zero3_fp32"])
def test_memory_that_runs_out_later_ends_all_ranks_and_names_the_remedy(tmp_path, inputs, json_name):
    """One rank in its backward pass, while the other waits for it."""
    limit = {"rows": 0, "where": "backward", "rank": 1, "step": 2}
    finished = train(inputs, tmp_path / "run", "--per_device_train_batch_size", "16", limit=limit, json_name=json_name)
    assert finished.returncode != 0
    assert "let --auto_micro_batch find one that fits" in finished.stderr, finished.output
    assert len(logged(tmp_path / "run")) == 2
    assert "Traceback" not in finished.output
