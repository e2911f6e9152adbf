"""The work that all contenders do: one model, one set of examples, one recipe."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adakron.backbone import NewParameters, load_backbone
from adakron.config import RunConfig
from adakron.tasks import create_task
from adakron.tasks.base import EncodedSplit
from launch.arguments import parse_train

DEEPSPEED = {"bf16": "ds_configs/zero2.json", "fp32": "ds_configs/zero2_fp32.json", "fp16": "ds_configs/zero2_fp16.json"}


@dataclass(frozen=True)
class Workload:
    """Numbers of one comparison.

    task_name, data_dir, model: as flags of launch/train.py have them; model None is the packaged MiniLM. examples: of the training
    split, from its begin. rounds: timed passes over them; one more comes before, untimed. precision: fp32, bf16 or fp16.
    """

    task_name: str
    data_dir: str | None
    model: str | None
    precision: str
    batch: int = 32
    examples: int = 1024
    rounds: int = 5
    max_seq_length: int = 128
    learning_rate: float = 1e-3
    bottleneck_dim: int = 48
    lora_rank: int = 8
    seed: int = 42

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of one pass."""
        return -(-self.examples // self.batch)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the warm-up pass and all timed ones."""
        return self.steps_per_round * (self.rounds + 1)

    def to_dict(self) -> dict[str, Any]:
        """For another process."""
        return dataclasses.asdict(self)

    def flags(self, *more: str) -> list[str]:
        """Flags of launch/train.py."""
        given = ["--task_name", self.task_name, "--deepspeed", DEEPSPEED[self.precision], "--max_seq_length", str(self.max_seq_length)]
        for name, value in (("--data_dir", self.data_dir), ("--model_name_or_path", self.model)):
            given += [name, value] if value is not None else []
        numbers = {
            "per_device_train_batch_size": self.batch, "max_train_samples": self.examples, "max_steps": self.total_steps,
            "learning_rate": self.learning_rate, "bottleneck_dim": self.bottleneck_dim, "seed": self.seed, "warmup_ratio": 0.06,
        }  # fmt: skip
        for name, number in numbers.items():
            given += [f"--{name}", str(number)]
        return [*given, "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "yes", "--do_train", *more]

    def config(self, *more: str) -> RunConfig:
        """The same as a configuration."""
        return parse_train(self.flags(*more))


@dataclass(frozen=True)
class Loaded:
    """What a peer trains: a model with a new head, and examples as our task tokenises them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_parameters: NewParameters
    train: EncodedSplit

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary of lists per example, as a tokenizer of transformers returns them, with its label."""
        assert self.train.labels is not None
        offsets, names = self.train.offsets, list(self.train.features)
        return [
            {
                **{name: self.train.features[name][offsets[i] : offsets[i + 1]].tolist() for name in names},
                "attention_mask": [1] * int(offsets[i + 1] - offsets[i]),
                "labels": self.train.labels[i].item(),
            }
            for i in range(len(self.train))
        ]


def load(workload: Workload) -> Loaded:
    """Model, tokenizer and examples, for a peer that has its own loop."""
    config = workload.config()
    task = create_task(config.data, config.training)
    base = load_backbone(config.model, auto_class=task.auto_class, options=task.model_options(), seed=workload.seed)
    return Loaded(base.model, base.tokenizer, base.new_parameters, task.encode("train", base.tokenizer))


def tokens(train: EncodedSplit) -> int:
    """Useful ones of a pass: without padding."""
    return int(np.sum(train.lengths))
