"""transformers' Trainer with PEFT: dynamic padding, batches of similar lengths."""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoKrConfig, LoraConfig, TaskType, get_peft_model
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from adakron import models
from adakron.weights import DTYPES
from launch.contenders.pace import Pace
from launch.contenders.phases import Phases
from launch.contenders.workload import EVALUATION_BATCH, Loaded, Workload, load, rows


def lora(workload: Workload, pace: Pace) -> None:
    """LoRA on the query and value projections, as PEFT chooses them; bf16 by the Trainer's autocast."""
    _train(workload, pace, LoraConfig(task_type=TaskType.SEQ_CLS, r=workload.lora_rank, lora_alpha=16))


def lora_cast(workload: Workload, pace: Pace) -> None:
    """The same with the backbone's weights in the run's precision, which a careful user asks for by `dtype`."""
    _train(workload, pace, LoraConfig(task_type=TaskType.SEQ_CLS, r=workload.lora_rank, lora_alpha=16), cast=True)


def lokr(workload: Workload, pace: Pace) -> None:
    """PEFT's Kronecker method: LoKr."""
    targets = ["query", "value"]
    _train(workload, pace, LoKrConfig(task_type=TaskType.SEQ_CLS, r=workload.lora_rank, alpha=16, target_modules=targets))


def adakron(workload: Workload, pace: Pace) -> None:
    """Our adapters through the bridge to PEFT."""
    from adakron.peft import AdaKronConfig

    _train(workload, pace, AdaKronConfig(task_type=TaskType.SEQ_CLS, bottleneck_dim=workload.bottleneck_dim))


class _Turns(TrainerCallback):
    def __init__(self, pace: Pace):
        self._pace = pace

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._pace.before_step()


def _train(workload: Workload, pace: Pace, config: Any, *, cast: bool = False) -> None:
    loaded = load(workload)
    if cast:
        models.cast_parameters(loaded.model, DTYPES[workload.precision])
    model: Any = get_peft_model(loaded.model, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=workload.batch, num_train_epochs=workload.passes, learning_rate=workload.learning_rate,
            warmup_steps=workload.warmup_steps, bf16=workload.precision == "bf16", fp16=workload.precision == "fp16",
            train_sampling_strategy="group_by_length", logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True,
            seed=workload.seed, use_cpu=not torch.cuda.is_available(), per_device_eval_batch_size=EVALUATION_BATCH,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, DataCollatorWithPadding(loaded.tokenizer), datasets.Dataset.from_list(rows(loaded.train)),
            compute_metrics=_accuracy, callbacks=[_Turns(pace)],
        )  # fmt: skip
        pace.instrument = partial(_instrument, trainer)
        trainer.train()
        pace.end_round()
        pace.evaluation(lambda: _scoring(trainer, loaded))


def _instrument(trainer: Trainer, phases: Phases) -> None:
    """The Trainer fetches a step's batch behind the step before."""
    for owner, name, phase in (
        (trainer, "get_batch_samples", "data"), (trainer, "_prepare_inputs", "data"), (trainer, "compute_loss", "forward"),
        (trainer.accelerator, "backward", "backward"), (trainer, "_clip_grad_norm", "optimizer"), (trainer.optimizer, "step", "optimizer"),
        (trainer.lr_scheduler, "step", "optimizer"), (trainer, "_maybe_log_save_evaluate", "log"),
    ):  # fmt: skip
        phases.wrap(owner, name, phase)


def _scoring(trainer: Trainer, loaded: Loaded) -> Callable[[], object]:
    assert loaded.validation is not None
    return partial(trainer.evaluate, datasets.Dataset.from_list(rows(loaded.validation)))


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}
