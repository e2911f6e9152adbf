"""On a GPU runs compute what they do on the CPU. Everything here skips where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adakron.nn import DropoutMasks
from tests.helpers.launch import deepspeed, logged, python, results

pytestmark = [pytest.mark.gpu, pytest.mark.launcher, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

STEPS = 30
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Of losses, relative to those of fp32 on the CPU. Products of fp32 are fp32 on the GPU too: torch's default allows no TF32 in them."""


def train(folder: Path, *flags: str, precision: str = "fp32", ranks: int = 1, on_cpu: bool = False) -> list[float]:
    name = "zero2" if precision == "bf16" else f"zero2_{precision}"
    finished = deepspeed(
        "launch/train.py", "--deepspeed", f"ds_configs/{name}.json", "--task_name", "quickstart", "--max_steps", str(STEPS),
        "--per_device_train_batch_size", str(16 // ranks), "--logging_steps", "1", "--save_strategy", "no", "--do_train", "--do_eval",
        "--max_eval_samples", "200", "--output_dir", str(folder), *flags, ranks=ranks, env={"DS_ACCELERATOR": "cpu"} if on_cpu else {},
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    assert ("x cpu, ZeRO-" in finished.output) == on_cpu
    losses = logged(folder)
    assert len(losses) == STEPS
    return losses


def assert_near(found: list[float], expected: list[float], tolerance: float) -> None:
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) <= tolerance


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("cpu") / "run"
    return folder, train(folder, on_cpu=True)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_losses_are_those_of_the_cpu(on_cpu, tmp_path, precision):
    assert_near(train(tmp_path / "run", precision=precision), on_cpu[1], TOLERANCE[precision])
    assert results(tmp_path / "run")["peak_memory_mib"] > 0


@pytest.mark.parametrize("flags", [("--unpad", "no"), ("--gradient_checkpointing", "yes")], ids=["padded", "checkpointed"])
def test_ways_to_compute_do_not_matter(on_cpu, tmp_path, flags):
    assert_near(train(tmp_path / "run", *flags), on_cpu[1], TOLERANCE["fp32"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("stage", [2, 3])
def test_two_gpus_compute_what_one_does(on_cpu, tmp_path, stage):
    flags = () if stage == 2 else ("--deepspeed", "ds_configs/zero3_fp32.json")
    assert_near(train(tmp_path / "run", *flags, ranks=2), on_cpu[1], TOLERANCE["fp32"])


def test_an_adapter_of_the_cpu_scores_the_same(on_cpu):
    folder, _ = on_cpu
    there = results(folder)
    finished = python("launch/evaluate.py", str(folder), "--max_eval_samples", "200")
    assert finished.returncode == 0, finished.output
    assert results(folder)["eval_accuracy"] == pytest.approx(there["eval_accuracy"], abs=0.011)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_drops_the_same_elements(dtype):
    found = []
    for device in ("cpu", "cuda"):
        masks = DropoutMasks(3)
        masks.training_pass(5, 0, np.arange(4))
        with masks.running(4, 9):
            found.append(masks.noise(torch.empty(4, 9, 50, dtype=dtype, device=device), 0.1).cpu())
    assert torch.equal(*found) and 0 < (found[0] == 0).float().mean() < 0.2


def test_the_benchmark_runs(tmp_path):
    file = tmp_path / "bench.json"
    finished = python(
        "launch/bench.py", "--examples", "64", "--rounds", "1", "--contenders", "adakron", "hf_lora", "--json", str(file), timeout=480
    )
    assert finished.returncode == 0, finished.output
    assert "GFLOP/s" in finished.stdout and file.is_file()
