"""What makes training faster leaves its losses as they were: the real MiniLM, launched, for 50 steps."""

from pathlib import Path

import pytest

from adakron.nn import native
from tests.helpers.launch import deepspeed, logged

pytestmark = pytest.mark.launcher

STEPS = 50
PLAIN = ("--unpad", "no", "--kernels", "torch")


def losses(folder: Path, *flags: str, precision: str = "fp32") -> list[float]:
    name = "zero2" if precision == "bf16" else f"zero2_{precision}"
    finished = deepspeed(
        "launch/train.py", "--deepspeed", f"ds_configs/{name}.json", "--task_name", "quickstart", "--max_steps", str(STEPS),
        "--per_device_train_batch_size", "8", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--do_train",
        "--output_dir", str(folder), *flags,
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    assert ("padding is computed" in finished.output) == ("no" in flags)
    found = logged(folder)
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("plain") / "run", *PLAIN)


@pytest.mark.parametrize("flags", [("--kernels", "torch"), ()], ids=["unpadded", "unpadded and compiled"])
def test_in_fp32_losses_are_those_of_the_plain_path(tmp_path, plain, flags):
    if not flags and (problem := native.load()):
        pytest.skip(problem)
    found = losses(tmp_path / "run", *flags)
    assert max(abs(a - b) / b for a, b in zip(found, plain, strict=True)) <= 1e-6
    assert min(found) < 0.9 * found[0]  # something was learned


def test_in_bf16_they_are_near_those_of_fp32_on_both_paths(tmp_path, plain):
    fast, slow = (losses(tmp_path / str(i), *flags, precision="bf16") for i, flags in enumerate(((), PLAIN)))

    def distance(found: list[float]) -> float:
        return max(abs(a - b) / b for a, b in zip(found, plain, strict=True))

    print("largest relative distance from fp32: plain", distance(slow), "fast", distance(fast))  # docs/performance.md has them
    assert distance(fast) <= 2e-2 and distance(slow) <= 2e-2
