"""One global step is one computation: whatever the micro-batch, accumulation, number of ranks and ZeRO stage, its loss, its
gradient norm and the trained parameters are those of a plain PyTorch loop that sees the whole global batch at once.

Every case runs in real processes behind the `deepspeed` launcher; a launch trains all cases of its number of ranks and
precision. The training data never divides into global batches, so the short last batch of an epoch is always among the steps.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from adakron.data.sampler import GlobalBatchSampler
from tests.helpers.engine_worker import Case
from tests.helpers.exactness import Outcome, assert_same, deviation, launched, plain_loop
from tests.helpers.problems import PROBLEMS, SEED, prepare, write_inputs

pytestmark = pytest.mark.launcher

# Bounds of the deviation from the plain loop, about three times the largest measured over all cases below:
# losses 2.7e-7, gradient norms 7.0e-7, change of a tensor 8.7e-6 in fp32; 4.1e-3, 1.9e-2, 6.3e-2 in bf16, whose numbers are
# spaced 7.8e-3 apart.
FP32 = {"loss": 1e-6, "grad_norm": 2e-6, "change": 3e-5}
# An expert that a step does not draw has a zero gradient there, and moves by Adam's memory alone; where a tensor has many
# entries with gradients near epsilon, rounding shows more. Measured up to 9.0e-5.
LOOSER = {problem: FP32 | {"change": 3e-4} for problem in ("mixture", "plain mixture", "tuned scores", "everything")}
# Fifty steps with dropout.
LOOSER |= {problem: {"loss": 1e-5, "grad_norm": 1e-5, "adapter": 1e-5} for problem in ("long", "long language model", "long mixture")}
BF16 = {"loss": 1e-2, "grad_norm": 5e-2, "change": 2e-1}

ALL_STAGES = ("zero0_fp32", "zero1", "zero2_fp32", "zero3")
TWO_STAGES = ("zero0_fp32", "zero2_fp32")
Layouts = Sequence[tuple[int, int, int]]
"""(ranks, micro-batch, accumulation), with the same product in all cases of a problem."""


def cases(problem: str, names: Sequence[str], layouts: Layouts, *, bf16: bool = False) -> list[Case]:
    return [
        Case(problem=problem, deepspeed=name, ranks=ranks, micro_batch=micro, accumulation=steps, bf16=bf16)
        for name in names
        for ranks, micro, steps in layouts
    ]


CORRECT = [
    *cases("classification", ALL_STAGES, [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 4, 1), (2, 2, 2), (2, 1, 4)]),
    *cases("counted", ALL_STAGES, [(1, 4, 2), (1, 1, 8), (2, 2, 2), (2, 1, 4)]),
    *cases("regression", TWO_STAGES, [(1, 6, 1), (1, 2, 3), (2, 3, 1), (2, 1, 3)]),
    *cases("unclipped", TWO_STAGES, [(1, 3, 2), (2, 3, 1)]),
    # A micro-batch draws its experts by its number in the step, so only these layouts draw the same.
    *cases("mixture", ALL_STAGES, [(1, 8, 1), (2, 4, 1)]),
    *cases("plain mixture", TWO_STAGES, [(1, 6, 1), (2, 3, 1)]),
    *cases("tuned scores", ("zero2_fp32", "zero3"), [(1, 4, 2), (2, 2, 2)]),
    *cases("everything", ("zero2_fp32", "zero3"), [(2, 2, 2)]),
    *cases("long", ("zero2_fp32",), [(1, 2, 4), (2, 1, 4)]),
    *cases("long", ("zero3",), [(2, 2, 2)]),
    *cases("long language model", ("zero2_fp32",), [(1, 4, 2), (2, 1, 4)]),
    *cases("long mixture", ("zero1",), [(2, 4, 1)]),
]
SIXTEEN_BIT = [
    *cases("classification", ("zero1", "zero2", "zero3"), [(2, 2, 2)], bf16=True),
    *cases("regression", ("zero2",), [(2, 1, 3)], bf16=True),
    *cases("mixture", ("zero2", "zero3"), [(2, 4, 1)], bf16=True),
]
FAULTY = dataclasses.replace(cases("classification", ("zero2_fp32",), [(2, 2, 2)])[0], faulty=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbone and data of all problems."""
    path = tmp_path_factory.mktemp("exactness")
    write_inputs(path, PROBLEMS)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Outcome]:
    """The plain loop's outcome of every problem."""
    return {name: plain_loop(folder, name) for name in PROBLEMS}


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Outcome]:
    return launched(folder, 1, [case for case in CORRECT if case.ranks == 1])


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Outcome]:
    return launched(folder, 2, [*(case for case in CORRECT if case.ranks == 2), FAULTY])


@pytest.fixture(scope="module")
def bf16(folder: Path) -> dict[str, Outcome]:
    # One precision per process: DeepSpeed keeps some of its state for the whole process.
    return launched(folder, 2, SIXTEEN_BIT)


def named(chosen: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def test_the_problems_can_tell_right_from_wrong(folder: Path, plain: dict[str, Outcome]) -> None:
    for name, problem in PROBLEMS.items():
        assert problem.examples % problem.global_batch, name
        norms = plain[name].grad_norms
        if problem.max_grad_norm:
            assert max(norms) > problem.max_grad_norm, f"{name}: clipping never acts"
        else:
            assert min(norms) > 1.0, f"{name}: DeepSpeed's own default of clipping at 1 would go unseen"
        moved = [float((tensor - plain[name].start[key]).norm() / tensor.norm()) for key, tensor in plain[name].tensors.items()]
        assert min(moved) > 1e-2, f"{name}: a tensor hardly trains"
    assert min(plain["classification"].grad_norms) < PROBLEMS["classification"].max_grad_norm  # and steps that are not clipped
    encoded = prepare(folder, "counted")[1]
    assert 0 in encoded.target_counts
    shares = GlobalBatchSampler(encoded.lengths, micro_batch=1, global_batch=8, world_size=2, rank=1, seed=SEED).epoch(0)
    assert 0 in [len(rows) for batch in shares for rows in batch.micro_batches], "no rank ever runs out of examples"


@named([case for case in CORRECT if case.ranks == 1])
def test_one_rank_trains_as_plain_pytorch(case: Case, one_rank: dict[str, Outcome], plain: dict[str, Outcome]) -> None:
    assert_same(one_rank[case.name], plain[case.problem], LOOSER.get(case.problem, FP32))


@named([case for case in CORRECT if case.ranks == 2])
def test_two_ranks_train_as_plain_pytorch(case: Case, two_ranks: dict[str, Outcome], plain: dict[str, Outcome]) -> None:
    assert_same(two_ranks[case.name], plain[case.problem], LOOSER.get(case.problem, FP32))
    assert two_ranks[case.name].ranks_agree


@named(SIXTEEN_BIT)
def test_bf16_stays_near_fp32(case: Case, bf16: dict[str, Outcome], plain: dict[str, Outcome]) -> None:
    assert_same(bf16[case.name], plain[case.problem], BF16)
    assert bf16[case.name].ranks_agree
    assert deviation(bf16[case.name], plain[case.problem])["loss"] > FP32["loss"], "this did not run in bf16"


def test_a_wrong_factor_in_the_engine_is_noticed(two_ranks: dict[str, Outcome], plain: dict[str, Outcome]) -> None:
    expected = plain[FAULTY.problem]
    found = two_ranks[FAULTY.name]
    with pytest.raises(AssertionError, match="deviations"):
        assert_same(found, expected, FP32)
    assert found.grad_norms[0] == pytest.approx(expected.grad_norms[0] / 2, rel=1e-5)


def test_a_mean_of_micro_batch_means_is_noticed(folder: Path, plain: dict[str, Outcome]) -> None:
    wrong = plain_loop(folder, "classification", mean_of_means=4)
    assert wrong.losses[:2] == pytest.approx(plain["classification"].losses[:2], rel=1e-6)  # full batches hide the mistake
    assert wrong.grad_norms[2] != pytest.approx(plain["classification"].grad_norms[2], rel=1e-2)  # the short one shows it
    with pytest.raises(AssertionError, match="deviations"):
        assert_same(wrong, plain["classification"], FP32)
    with pytest.raises(AssertionError, match="deviations"):
        assert_same(wrong, plain["classification"], BF16)
