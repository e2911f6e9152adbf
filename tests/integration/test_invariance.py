"""Batch-geometry invariance: for fixed data, seed and global batch, runs agree across micro-batch, accumulation, ranks, ZeRO stage
and offload, with dropout off and on, for every kind of loss.

Cases cover every pair of values of any two of these factors; ADAKRON_FULL_MATRIX=1 runs every combination (hours).
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers.engine_worker import Case
from tests.helpers.exactness import Outcome, assert_same, launched, plain_loop
from tests.helpers.launch import Finished, python
from tests.helpers.problems import MATRIX, write_inputs

pytestmark = pytest.mark.launcher

BOUNDS = {"loss": 1e-5, "grad_norm": 1e-5, "adapter": 1e-5}
STAGES = [("zero0_fp32", False), ("zero1", False), ("zero2_fp32", False), ("zero3", False), ("zero2_fp32", True), ("zero3", True)]
"""(JSON, optimizer state offloaded to the CPU)."""
GLOBAL_BATCH = 32
LAYOUTS = [
    (ranks, micro, GLOBAL_BATCH // (ranks * micro))
    for ranks in (1, 2, 4)
    for micro in (1, 2, 4, 8, 16, 32)
    if ranks * micro <= GLOBAL_BATCH and GLOBAL_BATCH // (ranks * micro) <= 8
]
"""(ranks, micro-batch, accumulation)."""


def every_case() -> list[Case]:
    return [
        Case(problem=problem, deepspeed=name, ranks=ranks, micro_batch=micro, accumulation=steps, offload=offload)
        for problem, (name, offload), (ranks, micro, steps) in itertools.product(MATRIX, STAGES, LAYOUTS)
    ]


def pairs(case: Case) -> set[tuple[str, ...]]:
    """Every two settings that a case tries together."""
    loss, _, dropout = case.problem.partition(", ")
    factors = {
        "loss": loss, "dropout": dropout, "stage": f"{case.deepspeed} {case.offload}", "ranks": case.ranks, "micro": case.micro_batch,
        "accumulation": case.accumulation,
    }  # fmt: skip
    return set(itertools.combinations([f"{name} {value}" for name, value in factors.items()], 2))


def pairwise(cases: Sequence[Case]) -> list[Case]:
    """Few cases that try every two settings together which any case does: always the first with the most pairs still missing."""
    missing = set().union(*(pairs(case) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


CASES = every_case() if os.environ.get("ADAKRON_FULL_MATRIX") == "1" else pairwise(every_case())
VERIFIED = [
    Case(problem=f"{loss}, dropout 0.1", deepspeed=name, ranks=2, micro_batch=4, accumulation=4, offload=offload)
    for (name, offload), loss in zip(STAGES, itertools.cycle(("classification", "language model", "tokens")), strict=False)
]
"""Each as it is, and after a check of its batch invariance."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones and data of all problems."""
    path = tmp_path_factory.mktemp("invariance")
    write_inputs(path, MATRIX)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Outcome]:
    """The plain loop's outcome of every problem."""
    return {name: plain_loop(folder, name) for name in MATRIX}


def checked(case: Case) -> Case:
    return dataclasses.replace(case, verify=True)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Outcome]:
    """The outcome of every case; one launch for each number of ranks."""
    outcomes: dict[str, Outcome] = {}
    for ranks in (1, 2, 4):
        chosen = {case.name: case for case in (*CASES, *VERIFIED, *map(checked, VERIFIED)) if case.ranks == ranks}
        outcomes |= launched(folder, ranks, [*chosen.values()])
    return outcomes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_batch_geometry_changes_nothing(case: Case, runs: dict[str, Outcome], plain: dict[str, Outcome]) -> None:
    assert_same(runs[case.name], plain[case.problem], BOUNDS)
    assert runs[case.name].ranks_agree


@pytest.mark.parametrize("case", VERIFIED, ids=lambda case: case.name)
def test_the_check_leaves_no_trace_in_a_run(case: Case, runs: dict[str, Outcome]) -> None:
    found, expected = runs[checked(case).name], runs[case.name]
    assert (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_the_check_stops_what_depends_on_the_micro_batch(folder: Path, tmp_path: Path) -> None:
    def start(name: str, *arguments: str) -> Finished:
        return python(
            "launch/train.py", "--deepspeed", "ds_configs/zero2_fp32.json", "--model_name_or_path", str(folder / "bert"),
            "--task_name", "text", "--data_dir", str(folder / "classification, dropout 0.1"), "--text_column", "text",
            "--label_column", "label", "--bottleneck_dim", "8", "--dropout", "0.1", "--do_train", "--max_steps", "2",
            "--per_device_train_batch_size", "8", "--eval_strategy", "no", "--verify_batch_invariance",
            "--output_dir", str(tmp_path / name), *arguments,
        )  # fmt: skip

    passed = start("masks")
    assert passed.returncode == 0, passed.output
    assert "batch invariance: gradients in halves of the micro-batches differ by" in passed.stderr
    assert json.loads((tmp_path / "masks" / "run.json").read_text())["config"]["training"]["dropout_masks"] == "per_example"
    stopped = start("stream", "--dropout_masks", "framework")
    assert stopped.returncode == 2, stopped.output
    assert "set --dropout_masks per_example or --dropout 0" in stopped.stderr
    assert "Traceback" not in stopped.output
