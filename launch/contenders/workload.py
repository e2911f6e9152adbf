"""The work that all contenders do: one model, one set of examples, one recipe."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adakron.backbone import NewParameters, load_backbone
from adakron.config import RunConfig
from adakron.errors import DataError
from adakron.tasks import create_task
from adakron.tasks.base import EncodedSplit, Task
from launch.arguments import DEFAULT_DEEPSPEED, parse_train

DEEPSPEED = {"bf16": "zero2.json", "fp32": "zero2_fp32.json", "fp16": "zero2_fp16.json"}

WARMUP_RATIO = 0.06
"""Of all steps, as the published recipes have it."""

EVALUATION_BATCH = 64
"""Examples of a forward pass when a split is scored: the default of launch/train.py."""


@dataclass(frozen=True)
class Workload:
    """Numbers of one comparison.

    task_name, data_dir, model: as flags of launch/train.py have them; model None is the packaged MiniLM. examples: of the training
    split, from its beginning. rounds: timed passes over them; one more comes before, untimed, and one behind, in which the phases of steps
    are measured. precision: fp32, bf16 or fp16. batch: examples of a step, on all ranks. evaluation_examples: of the validation split,
    from its beginning, to score in as many rounds; 0: none. model_size: of `sizes.SIZES`, where the model is a random one of that size.
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
    evaluation_examples: int = 0
    model_size: str | None = None

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of one pass."""
        return -(-self.examples // self.batch)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all passes."""
        return self.steps_per_round * self.passes

    @property
    def warmup_steps(self) -> int:
        """Of all optimizer steps, rounded as this engine does."""
        return math.ceil(WARMUP_RATIO * self.total_steps)

    @property
    def passes(self) -> int:
        """Over the examples: the one that warms up, the timed ones, the traced one."""
        return self.rounds + 2

    def to_dict(self) -> dict[str, Any]:
        """For another process."""
        return dataclasses.asdict(self)

    def flags(self, *more: str, ranks: int = 1) -> list[str]:
        """Flags of launch/train.py. ranks: among which a step's examples are dealt out."""
        deepspeed = DEFAULT_DEEPSPEED.with_name(DEEPSPEED[self.precision])
        given = ["--task_name", self.task_name, "--deepspeed", str(deepspeed), "--max_seq_length", str(self.max_seq_length)]
        for name, value in (("--data_dir", self.data_dir), ("--model_name_or_path", self.model)):
            given += [name, value] if value is not None else []
        numbers = {
            "per_device_train_batch_size": -(-self.batch // ranks), "global_batch_size": self.batch,
            "per_device_eval_batch_size": EVALUATION_BATCH, "max_eval_samples": max(1, self.evaluation_examples),
            "max_train_samples": self.examples, "max_steps": self.total_steps,
            "learning_rate": self.learning_rate, "bottleneck_dim": self.bottleneck_dim, "seed": self.seed, "warmup_ratio": WARMUP_RATIO,
        }  # fmt: skip
        for name, number in numbers.items():
            given += [f"--{name}", str(number)]
        return [*given, "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "yes", "--do_train", *more]

    def config(self, *more: str, ranks: int = 1) -> RunConfig:
        """The same as a configuration."""
        return parse_train(self.flags(*more, ranks=ranks))


@dataclass(frozen=True)
class Loaded:
    """What a peer trains: a model with a new head, and examples as our task tokenises them. validation: None where none is scored."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_parameters: NewParameters
    train: EncodedSplit
    validation: EncodedSplit | None


def load(workload: Workload) -> Loaded:
    """Model, tokenizer and examples, for a peer that has its own loop."""
    config = workload.config()
    task = create_task(config.data, config.training)
    base = load_backbone(config.model, auto_class=task.auto_class, options=task.model_options(), seed=workload.seed)
    validation = task.encode(validation_split(task), base.tokenizer) if workload.evaluation_examples else None
    return Loaded(base.model, base.tokenizer, base.new_parameters, task.encode("train", base.tokenizer), validation)


def validation_split(task: Task) -> str:
    """The first one that the task has; DataError where it has none."""
    name = next((name for name in task.splits() if name.startswith("validation")), None)
    if name is None:
        raise DataError(f"task {task.name} has no validation split to score; add it to --data_dir, or drop --evaluation")
    return name


def rows(split: EncodedSplit) -> list[dict[str, Any]]:
    """One dictionary of lists per example, as a tokenizer of transformers returns them, with its label."""
    assert split.labels is not None
    offsets, names = split.offsets, list(split.features)
    return [
        {
            **{name: split.features[name][offsets[i] : offsets[i + 1]].tolist() for name in names},
            "attention_mask": [1] * int(offsets[i + 1] - offsets[i]),
            "labels": split.labels[i].item(),
        }
        for i in range(len(split))
    ]


def tokens(split: EncodedSplit) -> int:
    """Useful ones of a pass: without padding."""
    return int(np.sum(split.lengths))
