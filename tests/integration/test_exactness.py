"""One global step is one computation: whatever the micro-batch, accumulation, number of ranks and ZeRO stage, its loss, its
gradient norm and the trained parameters are those of a plain PyTorch loop that sees the whole global batch at once.

Every case runs in real processes behind the `deepspeed` launcher; a launch trains all cases of its number of ranks and
precision. The training data never divides into global batches, so the short last batch of an epoch is always among the steps.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from adakron import models
from adakron.data.sampler import GlobalBatchSampler, epoch_order
from tests.helpers.engine_worker import PROBLEMS, SEED, Case, prepare, write_inputs
from tests.helpers.launch import deepspeed

pytestmark = pytest.mark.launcher

# Bounds of the deviation from the plain loop, about three times the largest measured over all cases below:
# losses 2.7e-7, gradient norms 7.0e-7, change of a tensor 8.7e-6 in fp32; 4.1e-3, 1.9e-2, 6.3e-2 in bf16, whose numbers are
# spaced 7.8e-3 apart.
FP32 = {"loss": 1e-6, "grad_norm": 2e-6, "change": 3e-5}
# An expert that a step does not draw has a zero gradient there, and moves by Adam's memory alone; where a tensor has many
# entries with gradients near epsilon, rounding shows more. Measured up to 9.0e-5.
LOOSER = {problem: FP32 | {"change": 3e-4} for problem in ("mixture", "plain mixture", "tuned scores", "everything")}
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
]
SIXTEEN_BIT = [
    *cases("classification", ("zero1", "zero2", "zero3"), [(2, 2, 2)], bf16=True),
    *cases("regression", ("zero2",), [(2, 1, 3)], bf16=True),
    *cases("mixture", ("zero2", "zero3"), [(2, 4, 1)], bf16=True),
]
FAULTY = dataclasses.replace(cases("classification", ("zero2_fp32",), [(2, 2, 2)])[0], faulty=True)


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    tensors: dict[str, Tensor]
    start: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ranks_agree: bool = True


def deviation(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Largest relative deviation of any step's loss, of any step's gradient norm, and of any tensor's change since the start (L2)."""
    assert found.tensors.keys() == expected.tensors.keys()
    assert len(found.losses) == len(found.grad_norms) == len(expected.losses)

    def furthest(values: Sequence[float], others: Sequence[float]) -> float:
        return float(np.max(np.abs(np.subtract(values, others)) / np.abs(others)))

    return {
        "loss": furthest(found.losses, expected.losses),
        "grad_norm": furthest(found.grad_norms, expected.grad_norms),
        "change": max(
            float((found.tensors[name] - tensor).norm() / (tensor - expected.start[name]).norm())
            for name, tensor in expected.tensors.items()
            # A softmax ignores what is added to all its arguments, so this gradient is rounding alone, and Adam divides by its size.
            if not name.endswith("key.bias")
        ),
    }


def assert_same(found: Outcome, expected: Outcome, bounds: dict[str, float]) -> None:
    deviations = deviation(found, expected)
    # Not "any larger": a NaN is larger than nothing.
    assert all(deviations[name] <= bound for name, bound in bounds.items()), f"deviations {deviations}, bounds {bounds}"
    assert found.learning_rates == pytest.approx(expected.learning_rates, rel=1e-6)


def plain_loop(folder: Path, name: str, *, mean_of_means: int | None = None) -> Outcome:
    """The same training without DeepSpeed, sampler, collation, task or trainer.

    mean_of_means: size of micro-batches whose mean losses are averaged, the mistake that the engine must not make.
    """
    problem = PROBLEMS[name]
    training = problem.training()
    _, encoded, model = prepare(folder, name)
    model.train()  # the backbone has no dropout; mixtures draw experts
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    biases_and_norms = [p for name, p in trained.items() if p.dim() == 1 or name.endswith("bias")]
    others = [p for name, p in trained.items() if p.dim() > 1 and not name.endswith("bias")]
    groups = [{"params": others, "weight_decay": training.weight_decay}, {"params": biases_and_norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_epsilon
    )
    schedulers: dict[str, Callable[[], torch.optim.lr_scheduler.LRScheduler]] = {
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, training.warmup_steps, problem.steps),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, training.warmup_steps, problem.steps),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, training.warmup_steps),
    }
    scheduler = schedulers[problem.schedule]()

    router = models.route_experts(model, SEED)
    disagreements: list[float] = []

    def mean_loss(rows: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        loss, outputs = one_pass(rows, (step, 0, 0))
        if not problem.consistency:
            return loss, loss.detach()
        _, again = one_pass(rows, (step, 0, 1))
        if problem.regression:
            # Half of each square holds the other pass constant: in value the mean square, with half of its gradient from each.
            differences = (outputs - again.detach()).square() + (again - outputs.detach()).square()
            disagreement = differences.mean() / 2
        else:
            p, q = outputs.softmax(-1), again.softmax(-1)
            to_first = (q.detach() * (q.detach().log() - p.log())).sum(-1)
            to_second = (p.detach() * (p.detach().log() - q.log())).sum(-1)
            disagreement = (to_first + to_second).mean() / 2
        disagreements.append(float(disagreement.detach()))
        return loss + problem.consistency * disagreement, loss.detach()

    def one_pass(rows: np.ndarray, position: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        if router is not None:
            router.training_pass(*position)
        tokens = torch.zeros(len(rows), 16, dtype=torch.int64)  # the longest input, so another padding than the engine's batches
        mask = torch.zeros_like(tokens)
        for line, row in enumerate(rows):
            found = encoded.features["input_ids"][encoded.offsets[row] : encoded.offsets[row + 1]]
            tokens[line, : len(found)], mask[line, : len(found)] = torch.from_numpy(found.astype(np.int64)), 1
        logits = model(input_ids=tokens, attention_mask=mask).logits
        assert encoded.labels is not None
        labels = torch.from_numpy(encoded.labels[rows])
        if problem.regression:
            return F.mse_loss(logits[:, 0], labels), logits
        if name == "counted":
            return torch.dot(F.cross_entropy(logits, labels, reduction="none"), (labels / labels.sum()).to(logits.dtype)), logits
        return F.cross_entropy(logits, labels), logits

    outcome = Outcome([], [], [], {}, start={name: p.detach().clone() for name, p in trained.items()})
    for epoch in range(2):
        order = epoch_order(problem.examples, SEED, epoch)
        for start in range(0, problem.examples, problem.global_batch):
            rows = order[start : start + problem.global_batch]
            parts = [rows] if mean_of_means is None else [rows[at : at + mean_of_means] for at in range(0, len(rows), mean_of_means)]
            means = [mean_loss(part, len(outcome.losses)) for part in parts]
            torch.stack([total for total, _ in means]).mean().backward()
            loss = torch.stack([task_loss for _, task_loss in means]).mean()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), training.max_grad_norm or float("inf"))
            outcome.losses.append(float(loss))
            outcome.grad_norms.append(float(norm))
            outcome.learning_rates.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert not problem.consistency or sum(value > 1e-3 for value in disagreements) > 3, f"the passes agree: {disagreements}"
    outcome.tensors.update({name: p.detach().clone() for name, p in trained.items()})
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbone and data of all problems."""
    path = tmp_path_factory.mktemp("exactness")
    write_inputs(path)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Outcome]:
    """The plain loop's outcome of every problem."""
    return {name: plain_loop(folder, name) for name in PROBLEMS}


def launched(folder: Path, ranks: int, chosen: Sequence[Case]) -> dict[str, Outcome]:
    """Train cases in one launch; outcomes by the cases' names."""
    request = folder / f"request-{ranks}-{chosen[0].name}.json"
    result = request.with_name("result-" + request.name)
    request.write_text(json.dumps({"folder": str(folder), "cases": [dataclasses.asdict(case) for case in chosen]}))
    finished = deepspeed("--module", "tests.helpers.engine_worker", str(request), str(result), ranks=ranks)
    assert finished.returncode == 0, finished.output
    records = json.loads(result.read_text())
    return {
        case.name: Outcome(**record | {"tensors": {name: torch.tensor(values) for name, values in record["tensors"].items()}})
        for case, record in zip(chosen, records, strict=True)
    }


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
    shares = GlobalBatchSampler(encoded.lengths, micro_batch=1, accumulation=4, world_size=2, rank=1, seed=SEED).epoch(0)
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
