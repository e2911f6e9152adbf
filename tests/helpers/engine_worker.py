"""Trains many tiny cases in one launch, with the project's own tasks, sampler, trainer and engine.

Started as `deepspeed --module tests.helpers.engine_worker REQUEST RESULT`. REQUEST holds {"folder": ..., "cases": [...]};
rank 0 writes one record per case to RESULT. As a module and not as a script: a script's folder comes first on the path, and
`launch.py` in this one would hide the package of that name.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adakron import distributed, models, randomness, trainable
from adakron.data.sampler import GlobalBatchSampler
from adakron.engine import ds_config
from adakron.engine.engine import TrainingEngine
from adakron.evaluator import Evaluator
from adakron.launcher import World
from adakron.metrics import MetricRecorder
from adakron.trainer import Trainer
from launch.program import execute
from tests.helpers.launch import ROOT
from tests.helpers.problems import MATRIX, PAD, PROBLEMS, SEED, prepare


class FaultyEngine(TrainingEngine):
    """Forgets that DeepSpeed averages gradients over ranks. AdamW hides such a factor; the gradient norm does not."""

    def backward(self, loss_sum: Tensor, global_targets: int) -> None:
        super().backward(loss_sum, global_targets * distributed.world_size())


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run. deepspeed: name of a shipped JSON, whose precision `bf16` decides anew."""

    problem: str
    deepspeed: str
    ranks: int
    micro_batch: int
    accumulation: int
    bf16: bool = False
    faulty: bool = False
    offload: bool = False
    verify: bool = False

    @property
    def name(self) -> str:
        marks = ("-bf16" if self.bf16 else "") + ("-faulty" if self.faulty else "")
        marks += ("-offload" if self.offload else "") + ("-verify" if self.verify else "")
        return f"{self.problem}-{self.deepspeed}-{self.ranks}x{self.micro_batch}x{self.accumulation}{marks}"


class _Kept:
    """A metric sink that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(values)

    def close(self) -> None: ...


def train_case(folder: Path, case: Case, world: World, device: torch.device) -> dict[str, Any]:
    """Per-step losses, gradient norms and learning rates, the final tensors, and whether every rank holds the same ones."""
    task, encoded, model = prepare(folder, case.problem)
    problem = (PROBLEMS | MATRIX)[case.problem]
    training = dataclasses.replace(problem.training(case.micro_batch, case.accumulation), verify_batch_invariance=case.verify)
    source = ds_config.read_json(str(ROOT / "ds_configs" / f"{case.deepspeed}.json")) | {"bf16": {"enabled": case.bf16}}
    if case.offload:
        source = source | {"zero_optimization": source["zero_optimization"] | {"offload_optimizer": {"device": "cpu"}}}
    values = ds_config.RunValues(
        micro_batch=case.micro_batch, accumulation=case.accumulation, world_size=world.world_size, max_grad_norm=training.max_grad_norm
    )
    assert values.global_batch == problem.global_batch
    build = FaultyEngine if case.faulty else TrainingEngine
    announce = randomness.announcer(models.route_experts(model, SEED), randomness.mask_dropout(model, SEED))
    engine = build(
        model, trainable.trainable_groups(model, training.weight_decay), ds_config.resolve(source, values), training,
        total_steps=problem.steps, device=device,
    )  # fmt: skip
    sampler = GlobalBatchSampler(
        encoded.lengths,
        micro_batch=case.micro_batch,
        global_batch=problem.global_batch,
        world_size=world.world_size,
        rank=world.rank,
        seed=SEED,
    )
    kept = _Kept()
    trainer = Trainer(
        engine, task, sampler, encoded, {}, training, evaluator=Evaluator(task, batch_size=8, pad_token_id=PAD, device=device),
        recorder=MetricRecorder([kept]), pad_token_id=PAD, save_checkpoint=lambda *_: None,
        before_pass=announce,
    )  # fmt: skip
    tensors = {name: tensor.tolist() for name, tensor in trainer.run().tensors.items()}
    return {
        "losses": [step["train/loss"] for step in kept.steps],
        "grad_norms": [step["train/grad_norm"] for step in kept.steps],
        "learning_rates": [step["train/learning_rate"] for step in kept.steps],
        "tensors": tensors,
        "ranks_agree": all(other == tensors for other in distributed.all_gather_object(tensors)),
    }


def main(arguments: Sequence[str], world: World) -> None:
    """Train every case of the request, in order."""
    parser = argparse.ArgumentParser()
    parser.add_argument("request", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    given = parser.parse_args(arguments)
    request = json.loads(given.request.read_text())
    device = distributed.select_device(world, os.environ)
    distributed.form_group(world, device)
    folder = Path(request["folder"])
    results = [train_case(folder, Case(**values), world, device) for values in request["cases"]]
    if world.rank == 0:
        given.result.write_text(json.dumps(results))


if __name__ == "__main__":
    execute(main)
