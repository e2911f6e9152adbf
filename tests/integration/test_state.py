"""States of training engines: saved under any ZeRO stage, precision and number of ranks, and gone on with under any other.

Three launches do all 400 ordered pairs; the sizes of the tensors are odd, so that no two ranks divide them.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from adakron.engine.state import EngineState
from tests.helpers.launch import deepspeed
from tests.helpers.state_worker import LAYOUTS, SAVED_AT

pytestmark = pytest.mark.launcher

ALL = [f"{precision}-{ranks}-{stage}" for precision, stage in LAYOUTS for ranks in (1, 2)]
# Largest deviation of a weight or moment after three more steps, about three times the largest measured: 1.2e-7 in fp32, 4.2e-4
# between layouts of bf16, 2.1e-5 of fp16, 1.1e-3 where the precision changes. Weights are about 1.
BOUNDS = {("fp32", "fp32"): 1e-6, ("bf16", "bf16"): 1.5e-3, ("fp16", "fp16"): 1e-4}
OTHER_PRECISION = 3e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    for ranks, modes in ((1, ["save"]), (2, ["save", "load"]), (1, ["load"])):
        finished = deepspeed("--module", "tests.helpers.state_worker", str(folder), *modes, ranks=ranks)
        assert finished.returncode == 0, finished.output
    return folder


def read(file: Path) -> Any:
    return torch.load(file, weights_only=False)


def deviation(found: EngineState, expected: EngineState) -> float:
    return max(
        float((tensor - expected.tensors[kind][name]).abs().max())
        for kind, named in found.tensors.items()
        for name, tensor in named.items()
    )


def test_a_loaded_state_is_the_saved_one(folder):
    for saved, target in itertools.product(ALL, ALL):
        expected: EngineState = read(folder / f"{saved}.state")
        found: EngineState = read(folder / f"{saved}-to-{target}.resumed")["loaded"]["state"]
        assert deviation(found, expected) == 0.0, (saved, target)
        assert found.steps == expected.steps == dict.fromkeys(expected.steps, SAVED_AT)
        assert (found.global_step, found.skipped_steps) == (expected.global_step, expected.skipped_steps)
        # What computes was refreshed from the masters: all layouts of a precision compute the same.
        alike = read(folder / f"{saved}-to-{target[:4]}-1-1.resumed")["loaded"]["outputs"]
        assert torch.equal(read(folder / f"{saved}-to-{target}.resumed")["loaded"]["outputs"], alike), (saved, target)


def test_the_same_layout_goes_on_bit_for_bit(folder):
    for layout in ALL:
        expected, found = read(folder / f"{layout}.undisturbed"), read(folder / f"{layout}-to-{layout}.resumed")
        assert deviation(found["state"], expected["state"]) == 0.0, layout
        assert torch.equal(found["outputs"], expected["outputs"])
        assert found["learning_rate"] == expected["learning_rate"]
        assert found["state"].loss_scale == expected["state"].loss_scale
        assert found["state"].skipped_steps == expected["state"].skipped_steps


def test_another_layout_goes_on_within_rounding(folder):
    for saved, target in itertools.product(ALL, ALL):
        expected, found = read(folder / f"{saved}.undisturbed"), read(folder / f"{saved}-to-{target}.resumed")
        bound = BOUNDS.get((saved[:4], target[:4]), OTHER_PRECISION)
        assert deviation(found["state"], expected["state"]) <= bound, (saved, target)
        assert found["learning_rate"] == expected["learning_rate"]


def test_fp16_goes_on_with_its_loss_scale(folder):
    for layout in (name for name in ALL if name.startswith("fp16")):
        state: EngineState = read(folder / f"{layout}.state")
        assert state.loss_scale is not None
        assert state.skipped_steps > 5  # the first scale overflows
        assert read(folder / f"{layout}-to-fp16-1-2.resumed")["loaded"]["state"].loss_scale == state.loss_scale
    assert read(folder / "fp32-1-0.state").loss_scale is None
