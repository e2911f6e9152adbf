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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from adakron import backbone, distributed, models, trainable
from adakron.config import AdapterConfig, DataConfig, ModelConfig, TrainingConfig
from adakron.data.sampler import GlobalBatchSampler
from adakron.distributed import World
from adakron.engine import ds_config
from adakron.engine.engine import TrainingEngine
from adakron.evaluator import Evaluator
from adakron.metrics import MetricRecorder
from adakron.tasks.base import Batch, EncodedSplit, Forward
from adakron.tasks.glue import TextTask
from adakron.trainer import Trainer
from launch.program import execute
from tests.helpers import tiny
from tests.helpers.launch import ROOT

SEED = 7
WEIGHT_SCALE = 8.0
PAD = 0


class CountedTask(TextTask):
    """An example of class c has c targets, so some have none: a micro-batch's targets are not its rows."""

    def encode(self, split: str, tokenizer: Any) -> EncodedSplit:
        encoded = super().encode(split, tokenizer)
        assert encoded.labels is not None
        return dataclasses.replace(encoded, target_counts=encoded.labels.astype(np.int64))

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.predict(forward, batch)
        each = F.cross_entropy(logits, batch["labels"], reduction="none")
        return (each * batch["labels"]).sum(), logits.detach()


class FaultyEngine(TrainingEngine):
    """Forgets that DeepSpeed averages gradients over ranks. AdamW hides such a factor; the gradient norm does not."""

    def backward(self, loss_sum: Tensor, global_targets: int) -> None:
        super().backward(loss_sum, global_targets * distributed.world_size())


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Data and training settings that the cases of one comparison share.

    examples: never a multiple of global_batch, so that every epoch ends with a short batch. steps: two epochs.
    """

    examples: int
    global_batch: int
    task: type[TextTask] = TextTask
    label: str = "label"
    regression: bool = False
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = 0.5
    steps: int = 6
    adapter: Mapping[str, Any] = field(default_factory=dict)
    consistency: float = 0.0

    def training(self, micro_batch: int = 1, accumulation: int = 1) -> TrainingConfig:
        return TrainingConfig(
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation, max_steps=self.steps, learning_rate=1e-2,
            weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, lr_scheduler_type=self.schedule, warmup_steps=2,
            max_grad_norm=self.max_grad_norm, seed=SEED, logging_steps=1, eval_strategy="no", save_strategy="no", disable_tqdm=True,
            consistency_weight=self.consistency,
        )  # fmt: skip


PROBLEMS = {
    "classification": Problem(examples=21, global_batch=8),
    "regression": Problem(examples=17, global_batch=6, label="score", regression=True, schedule="cosine"),
    "counted": Problem(examples=19, global_batch=8, task=CountedTask, schedule="constant"),
    "mixture": Problem(
        examples=21, global_batch=8, consistency=1.0,
        adapter={"method": "madakron", "num_experts": 3, "experts_in": "down_a,down_b,up", "expert_scores": "random"},
    ),
    "plain mixture": Problem(
        examples=17, global_batch=6, label="score", regression=True, consistency=0.5, adapter={"method": "adamix", "num_experts": 2},
    ),
    "tuned scores": Problem(examples=21, global_batch=8, adapter={"method": "madakron", "tune_expert_scores": True}),
    "everything": Problem(examples=21, global_batch=8, adapter={"method": "full"}),
    "unclipped": Problem(examples=17, global_batch=6, label="score", regression=True, max_grad_norm=0.0),
}  # fmt: skip


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

    @property
    def name(self) -> str:
        marks = ("-bf16" if self.bf16 else "") + ("-faulty" if self.faulty else "")
        return f"{self.problem}-{self.deepspeed}-{self.ranks}x{self.micro_batch}x{self.accumulation}{marks}"


def write_inputs(folder: Path) -> None:
    """The backbone and the training data of all problems."""
    tiny.save_tiny_bert(folder / "model")
    generator = torch.Generator().manual_seed(3)
    for name, problem in PROBLEMS.items():
        classes = torch.randint(3, (problem.examples,), generator=generator).tolist()
        scores = (3.0 * torch.randn(problem.examples, generator=generator)).tolist()
        rows: list[dict[str, Any]] = [
            {"text": text, "label": label, "score": score}
            for text, label, score in zip(tiny.sentences(problem.examples, seed=5), classes, scores, strict=True)
        ]
        tiny.write_jsonl(folder / name / "train.jsonl", rows)


def prepare(folder: Path, name: str) -> tuple[TextTask, EncodedSplit, PreTrainedModel]:
    """A problem's task, encoded training split and freshly adapted model; the same at every call."""
    problem = PROBLEMS[name]
    data = DataConfig(
        task_name="text", data_dir=str(folder / name), text_column="text", label_column=problem.label,
        problem="regression" if problem.regression else "classification",
    )  # fmt: skip
    task = problem.task(data, problem.training())
    base = backbone.load_backbone(
        ModelConfig(model_name_or_path=str(folder / "model")), auto_class=task.auto_class, options=task.model_options(), seed=SEED,
        device_type="cpu",
    )  # fmt: skip
    # Weights of 0.02 suit a hidden size of 768. At 32 so little would reach the adapters that rounding would decide their steps.
    for parameter in base.model.parameters():
        if parameter.dim() == 2:
            parameter.data *= WEIGHT_SCALE
    adapter = AdapterConfig(bottleneck_dim=8, init_std=0.2, **problem.adapter)
    models.adapt(base.model, adapter, seed=SEED, new_parameters=base.new_parameters)
    return task, task.encode("train", base.tokenizer), base.model


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
    problem = PROBLEMS[case.problem]
    training = problem.training(case.micro_batch, case.accumulation)
    source = ds_config.read_json(str(ROOT / "ds_configs" / f"{case.deepspeed}.json")) | {"bf16": {"enabled": case.bf16}}
    values = ds_config.RunValues(
        micro_batch=case.micro_batch, accumulation=case.accumulation, world_size=world.world_size, max_grad_norm=training.max_grad_norm
    )
    assert values.global_batch == problem.global_batch
    build = FaultyEngine if case.faulty else TrainingEngine
    router = models.route_experts(model, SEED)
    engine = build(
        model, trainable.trainable_groups(model, training.weight_decay), ds_config.resolve(source, values), training,
        total_steps=problem.steps, device=device,
    )  # fmt: skip
    sampler = GlobalBatchSampler(
        encoded.lengths,
        micro_batch=case.micro_batch,
        accumulation=case.accumulation,
        world_size=world.world_size,
        rank=world.rank,
        seed=SEED,
    )
    kept = _Kept()
    trainer = Trainer(
        engine, task, sampler, encoded, {}, training, evaluator=Evaluator(task, batch_size=8, pad_token_id=PAD, device=device),
        recorder=MetricRecorder([kept]), pad_token_id=PAD, save_checkpoint=lambda *_: None,
        before_pass=lambda place: router.training_pass(place.step, place.micro_step, place.index) if router else None,
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
