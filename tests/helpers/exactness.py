"""Launched runs of tiny problems, and the same training without DeepSpeed, sampler, collation or trainer to compare them with."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from adakron import models, randomness
from adakron.data.sampler import epoch_order
from tests.helpers.engine_worker import Case
from tests.helpers.launch import deepspeed
from tests.helpers.problems import IGNORED, MATRIX, PROBLEMS, SEED, LanguageTask, TokenTask, prepare


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    tensors: dict[str, Tensor]
    start: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ranks_agree: bool = True


def deviation(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Largest relative deviations: of any step's loss and gradient norm, of any tensor's change since the start, of all tensors (L2)."""
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
        "adapter": _norm([found.tensors[name] - tensor for name, tensor in expected.tensors.items()]) / _norm(expected.tensors.values()),
    }


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def assert_same(found: Outcome, expected: Outcome, bounds: dict[str, float]) -> None:
    deviations = deviation(found, expected)
    # Not "any larger": a NaN is larger than nothing.
    assert all(deviations[name] <= bound for name, bound in bounds.items()), f"deviations {deviations}, bounds {bounds}"
    assert found.learning_rates == pytest.approx(expected.learning_rates, rel=1e-6)


def plain_loop(folder: Path, name: str, *, mean_of_means: int | None = None) -> Outcome:
    """The same training without DeepSpeed, sampler, collation, task or trainer.

    mean_of_means: size of micro-batches whose mean losses are averaged, the mistake that the engine must not make.
    """
    problem = (PROBLEMS | MATRIX)[name]
    training = problem.training()
    _, encoded, model = prepare(folder, name)
    model.train()
    masks = randomness.mask_dropout(model, SEED)
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
        masks.training_pass(position[0], position[2], rows)
        tokens = torch.zeros(len(rows), 16, dtype=torch.int64)  # the longest input, so another padding than the engine's batches
        mask = torch.zeros_like(tokens)
        for line, row in enumerate(rows):
            found = encoded.features["input_ids"][encoded.offsets[row] : encoded.offsets[row + 1]]
            tokens[line, : len(found)], mask[line, : len(found)] = torch.from_numpy(found.astype(np.int64)), 1
        logits = model(input_ids=tokens, attention_mask=mask).logits
        if problem.task in (TokenTask, LanguageTask):
            targets = problem.task.targets(tokens, mask)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED), logits
        assert encoded.labels is not None
        labels = torch.from_numpy(encoded.labels[rows])
        if problem.regression:
            return F.mse_loss(logits[:, 0], labels), logits
        if name == "counted":
            return torch.dot(F.cross_entropy(logits, labels, reduction="none"), (labels / labels.sum()).to(logits.dtype)), logits
        return F.cross_entropy(logits, labels), logits

    outcome = Outcome([], [], [], {}, start={name: p.detach().clone() for name, p in trained.items()})
    for epoch in range(math.ceil(problem.steps / math.ceil(problem.examples / problem.global_batch))):
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
            if len(outcome.losses) == problem.steps:
                break
    assert not problem.consistency or sum(value > 1e-3 for value in disagreements) > 3, f"the passes agree: {disagreements}"
    outcome.tensors.update({name: p.detach().clone() for name, p in trained.items()})
    return outcome


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
