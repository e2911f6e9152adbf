"""Settings of the loop."""

import math
from dataclasses import dataclass
from typing import Literal

from adakron.settings import Settings, flag, negative_problems, positive_problems

Interval = Literal["no", "steps", "epoch"]

MOST_EXAMPLES = 10**9
"""Of a step, and of a micro-batch: beyond every data set, and within what DeepSpeed can print."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """The loop: batch, optimizer, schedule, evaluation, saving, logging."""

    output_dir: str | None = flag(None, "Folder of the run. Default: runs/<task>-<method>-seed<seed>-<date>.")
    overwrite_output_dir: bool = flag(False, "Replace a run that output_dir already holds.")
    resume_from_checkpoint: str | None = flag(
        None, "Go on with a run: its folder, one of its checkpoint-<step> folders, or auto, the newest one in output_dir if there is any."
    )
    max_hours: float | None = flag(None, "Stop with a checkpoint after so many hours of wall-clock time, to go on later.")
    do_train: bool | None = flag(None, "Train. Without any do_ flag: train and evaluate.")
    do_eval: bool | None = flag(None, "Evaluate on the validation split at the end.")
    do_predict: bool | None = flag(None, "Write predictions for the test split at the end.")
    per_device_train_batch_size: int = flag(32, "Examples of one forward pass on one rank.")
    per_device_eval_batch_size: int = flag(64, "Examples of one evaluation forward pass on one rank.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches per optimizer step on each rank.")
    global_batch_size: int | None = flag(
        None,
        "Examples of one optimizer step on all ranks together, however many there are; the accumulation follows, and"
        " per_device_train_batch_size is the most of one forward pass.",
    )
    auto_micro_batch: bool = flag(
        False,
        "Where per_device_train_batch_size does not fit into memory, halve it until it does, before training; the step keeps its examples"
        " and accumulation follows (docs/memory.md).",
    )
    num_train_epochs: float = flag(3.0, "Passes over the training split.")
    max_steps: int = flag(-1, "Optimizer steps in all; wins over num_train_epochs when positive.")
    learning_rate: float = flag(1e-3, "Peak learning rate.")
    weight_decay: float = flag(0.0, "Decoupled weight decay, on weight matrices only (never biases or LayerNorm).")
    adam_beta1: float = flag(0.9, "AdamW beta1.")
    adam_beta2: float = flag(0.999, "AdamW beta2.")
    adam_epsilon: float = flag(1e-8, "AdamW epsilon.")
    max_grad_norm: float = flag(1.0, "Clip the global gradient norm to this; 0 never clips.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = flag("linear", "Shape of the learning rate after the warm-up.")
    warmup_ratio: float = flag(0.06, "Share of all steps during which the learning rate rises from 0. Published: 0.06.")
    warmup_steps: int = flag(0, "Warm-up in steps; wins over warmup_ratio when positive.")
    consistency_weight: float = flag(
        0.0, "Weight of the consistency loss between two forward passes (docs/method.md); published: 1 for GLUE, 100 for text generation."
    )
    label_smoothing: float = flag(0.0, "Share of the target probability spread over all classes.", "--label_smoothing_factor")
    gradient_checkpointing: bool = flag(False, "Compute activations again in the backward pass: less memory, slower.")
    unpad: Literal["auto", "no"] = flag(
        "auto", "Train encoders without computing their padding, where the architecture allows it (docs/performance.md); no: never."
    )
    kernels: Literal["auto", "torch"] = flag(
        "auto",
        "On a CPU, compute what stands between matrix products by kernels compiled at first use (docs/performance.md); torch: never.",
    )
    bf16: bool | None = flag(None, 'Train in bfloat16, where the JSON says {"bf16": {"enabled": "auto"}}.')
    fp16: bool | None = flag(None, 'Train in float16, where the JSON says {"fp16": {"enabled": "auto"}}.')
    seed: int = flag(42, "Seed of initialisation, data order and dropout.")
    dropout_masks: Literal["per_example", "framework"] = flag(
        "per_example",
        "Dropout's masks: of each example at each step, whatever batch it is in (docs/exactness.md), or torch's stream per rank.",
    )
    verify_batch_invariance: bool = flag(False, "Before training, check that one step's gradient does not depend on the micro-batch.")
    logging_steps: int = flag(10, "Write training metrics every so many steps.")
    logging_dir: str | None = flag(None, "TensorBoard folder. Default: <output_dir>/tensorboard.")
    eval_strategy: Interval = flag("epoch", "When to evaluate during training.", "--evaluation_strategy")
    eval_steps: int | None = flag(None, "Evaluate every so many steps (eval_strategy steps). Default: logging_steps.")
    save_strategy: Interval = flag(
        "epoch", "When to save a checkpoint, the adapter and all that training needs to go on, as <output_dir>/checkpoint-<step>."
    )
    save_steps: int | None = flag(None, "Save every so many steps (save_strategy steps). Default: 500.")
    save_total_limit: int | None = flag(2, "Keep only the newest so many checkpoints, and the best one.")
    merge_experts: bool = flag(False, "Save the final adapter with its experts averaged into one.")
    load_best_model_at_end: bool = flag(False, "End with the best evaluated adapter instead of the last one.")
    metric_for_best_model: str | None = flag(None, "Metric that decides what is best. Default: the task's main metric.")
    greater_is_better: bool | None = flag(None, "Direction of that metric. Default: lower for loss, higher otherwise.")
    on_nonfinite: Literal["raise", "skip"] = flag(
        "raise",
        "A loss or gradient that is not finite: end the run, or skip the step, at most 5 in a row. Either way the batch is written.",
    )
    timeout_minutes: float = flag(30.0, "How long a rank waits for the others in any collective before the run ends.")
    deterministic: bool = flag(False, "Same machine, same command, same bits: deterministic kernels only, an error where there is none.")
    disable_tqdm: bool | None = flag(None, "No progress bar. Default: a bar on a terminal, plain lines otherwise.")

    def examples_per_step(self, world_size: int) -> int:
        """Examples of one optimizer step on so many ranks."""
        return self.global_batch_size or self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    def ranks_problem(self, world_size: int) -> str | None:
        """Why so many ranks cannot share a step, with the remedy; None where they can."""
        examples = self.examples_per_step(world_size)
        if examples >= world_size:
            return None
        return (
            f"global_batch_size is {examples} and there are {world_size} processes; each needs an example per step: start fewer, or"
            " give a larger --global_batch_size"
        )

    def problems(self) -> list[str]:
        found = positive_problems(
            self, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "global_batch_size",
            "logging_steps", "eval_steps", "save_steps", "save_total_limit",
        )  # fmt: skip
        found += [
            f"{name} has {len(str(value))} digits; it must be at most {MOST_EXAMPLES:,} (set --{name})"
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
            if (value := getattr(self, name)) is not None and value > MOST_EXAMPLES
        ]
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            found.append(
                f"global_batch_size and gradient_accumulation_steps ({self.gradient_accumulation_steps}) are both set; the second follows"
                " from the first: drop --gradient_accumulation_steps, or where a job script or --config gives it, set it to 1"
            )
        found += negative_problems(
            self, "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "seed", "num_train_epochs",
            "consistency_weight",
        )  # fmt: skip
        if not 0.0 < self.timeout_minutes <= 7 * 24 * 60:
            found.append(f"timeout_minutes is {self.timeout_minutes}; it must be above 0 and at most 10080, a week (set --timeout_minutes)")
        if self.seed >= 2**32:
            found.append(f"seed is {self.seed}; it must be below 2^32 (set --seed)")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            found.append(f"warmup_ratio is {self.warmup_ratio}; it is a share in [0, 1] (set --warmup_ratio, or --warmup_steps)")
        if not 0.0 <= self.label_smoothing < 1.0:
            found.append(f"label_smoothing is {self.label_smoothing}; it is a share in [0, 1) (set --label_smoothing)")
        found += [
            f"{name} is {getattr(self, name)}; AdamW needs a value in [0, 1) (set --{name})"
            for name in ("adam_beta1", "adam_beta2")
            if not 0.0 <= getattr(self, name) < 1.0
        ]
        if self.num_train_epochs > 1_000_000:
            found.append(f"num_train_epochs is {self.num_train_epochs}; it must be at most 1,000,000 (set --num_train_epochs)")
        if self.max_steps == 0 or self.max_steps < -1:
            found.append(f"max_steps is {self.max_steps}; it must be positive, or -1 for num_train_epochs (set --max_steps)")
        if self.num_train_epochs == 0 and self.max_steps < 0:
            found.append("num_train_epochs is 0 and max_steps is not set: nothing would be trained (set --num_train_epochs)")
        if self.bf16 and self.fp16:
            found.append("bf16 and fp16 are both set; choose one (drop --bf16 or --fp16)")
        found += self._best_model_problems()
        found += self._resume_problems()
        return found

    def _resume_problems(self) -> list[str]:
        found = []
        if self.max_hours is not None and not 0.0 < self.max_hours < math.inf:
            found.append(f"max_hours is {self.max_hours}; it must be a positive number of hours (set --max_hours)")
        if self.resume_from_checkpoint == "auto" and not self.output_dir:
            found.append("resume_from_checkpoint auto looks for checkpoints in output_dir, which is not set (set --output_dir)")
        if self.resume_from_checkpoint is not None and self.overwrite_output_dir:
            found.append(
                "overwrite_output_dir would delete what resume_from_checkpoint goes on from; drop one of --overwrite_output_dir and"
                " --resume_from_checkpoint"
            )
        return found

    def _best_model_problems(self) -> list[str]:
        if not self.load_best_model_at_end:
            return []
        if self.eval_strategy == "no":
            return ["load_best_model_at_end needs evaluations to choose from; set --eval_strategy epoch or steps"]
        return []
