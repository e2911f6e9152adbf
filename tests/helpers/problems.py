"""Tiny problems that exactness is measured on: data, task, backbone and training settings of each."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from adakron import backbone, models
from adakron.config import AdapterConfig, DataConfig, ModelConfig, TrainingConfig
from adakron.tasks.base import Batch, EncodedSplit, Forward
from adakron.tasks.glue import TextTask
from tests.helpers import tiny

SEED = 7
WEIGHT_SCALE = 8.0
PAD = 0
IGNORED = -100


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


class _InputTask(TextTask):
    """Targets are made from the input, several and unequally many in each example."""

    def collate(self, encoded: EncodedSplit, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
        batch = super().collate(encoded, indices, pad_token_id)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def encode(self, split: str, tokenizer: Any) -> EncodedSplit:
        encoded = super().encode(split, tokenizer)
        tokens = torch.from_numpy(encoded.features["input_ids"].astype(np.int64))
        each = [self.targets(part[None], torch.ones(1, len(part))) for part in tokens.split(encoded.lengths.tolist())]
        counts = np.array([int((targets != IGNORED).sum()) for targets in each])
        return dataclasses.replace(encoded, labels=None, target_counts=counts)

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = forward(**batch).logits.float()
        targets = self.targets(batch["input_ids"], batch["attention_mask"])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        return loss, logits[targets != IGNORED].detach()

    @staticmethod
    def targets(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) classes, IGNORED where a token has none."""
        raise NotImplementedError


class TokenTask(_InputTask):
    """Every word's class is its number modulo 3; every fourth word of the vocabulary, like special tokens, has none."""

    auto_class = "AutoModelForTokenClassification"

    @staticmethod
    def targets(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `_InputTask`."""
        return torch.where((input_ids > 4) & (input_ids % 4 != 0), input_ids % 3, IGNORED)


class LanguageTask(_InputTask):
    """The next token."""

    auto_class = "AutoModelForCausalLM"

    def model_options(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def targets(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `_InputTask`."""
        targets = torch.full_like(input_ids, IGNORED)
        targets[:, :-1] = torch.where(attention_mask[:, 1:] > 0, input_ids[:, 1:], IGNORED)
        return targets


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Data and training settings that the cases of one comparison share.

    examples: never a multiple of global_batch, so that every epoch ends with a short batch. steps: at least an epoch.
    dropout: probability of every dropout of the backbone and head; 0 leaves the backbone its own. model: folder of the backbone.
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
    dropout: float = 0.0
    learning_rate: float = 1e-2
    model: str = "bert"

    def training(self, micro_batch: int = 1, accumulation: int = 1) -> TrainingConfig:
        return TrainingConfig(
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation, max_steps=self.steps,
            learning_rate=self.learning_rate, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6,
            lr_scheduler_type=self.schedule, warmup_steps=2, max_grad_norm=self.max_grad_norm,
            seed=SEED, logging_steps=1, eval_strategy="no", save_strategy="no", disable_tqdm=True,
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
    "long": Problem(examples=21, global_batch=8, steps=50, dropout=0.1, learning_rate=1e-3),
    "long language model": Problem(
        examples=21, global_batch=8, steps=50, dropout=0.1, learning_rate=1e-3, task=LanguageTask, model="gpt2"
    ),
    "long mixture": Problem(
        examples=21, global_batch=8, steps=50, dropout=0.1, learning_rate=1e-3, consistency=1.0,
        adapter={"method": "madakron", "num_experts": 3},
    ),
}  # fmt: skip


_WIDE = {"examples": 75, "global_batch": 32, "steps": 3, "schedule": "constant"}
LOSSES: dict[str, Mapping[str, Any]] = {
    "classification": {},
    "regression": {"label": "score", "regression": True},
    "tokens": {"task": TokenTask},
    "language model": {"task": LanguageTask, "model": "gpt2"},
}
MATRIX = {
    f"{loss}, dropout {dropout}": Problem(**{**_WIDE, **settings, "dropout": dropout})
    for loss, settings in LOSSES.items()
    for dropout in (0.0, 0.1)
}
"""A global batch of 32, which 1, 2 and 4 ranks deal with in micro-batches of 1 to 32: by loss and dropout."""


def write_inputs(folder: Path, problems: Mapping[str, Problem]) -> None:
    """The backbones and the training data of problems."""
    tiny.save_tiny_bert(folder / "bert")
    tiny.save_tiny_gpt2(folder / "gpt2")
    generator = torch.Generator().manual_seed(3)
    for name, problem in problems.items():
        classes = torch.randint(3, (problem.examples,), generator=generator).tolist()
        scores = (3.0 * torch.randn(problem.examples, generator=generator)).tolist()
        rows: list[dict[str, Any]] = [
            {"text": text, "label": label, "score": score}
            for text, label, score in zip(tiny.sentences(problem.examples, seed=5), classes, scores, strict=True)
        ]
        tiny.write_jsonl(folder / name / "train.jsonl", rows)


def prepare(folder: Path, name: str) -> tuple[TextTask, EncodedSplit, PreTrainedModel]:
    """A problem's task, encoded training split and freshly adapted model; the same at every call."""
    problem = (PROBLEMS | MATRIX)[name]
    data = DataConfig(
        task_name="text", data_dir=str(folder / name), text_column="text", label_column=problem.label,
        problem="regression" if problem.regression else "classification",
    )  # fmt: skip
    task = problem.task(data, problem.training())
    base = backbone.load_backbone(
        ModelConfig(model_name_or_path=str(folder / problem.model), dropout=problem.dropout or None),
        auto_class=task.auto_class, options=task.model_options(), seed=SEED, device_type="cpu",
    )  # fmt: skip
    # Weights of 0.02 suit a hidden size of 768. At 32 so little would reach the adapters that rounding would decide their steps.
    for parameter in base.model.parameters():
        if parameter.dim() == 2:
            parameter.data *= WEIGHT_SCALE
    adapter = AdapterConfig(bottleneck_dim=8, init_std=0.2, **problem.adapter)
    models.adapt(base.model, adapter, seed=SEED, new_parameters=base.new_parameters)
    return task, task.encode("train", base.tokenizer), base.model
