"""The training loop. It knows an engine and a task, and neither a model nor an adapter."""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adakron.config import Interval, TrainingConfig
from adakron.data.sampler import GlobalBatch, GlobalBatchSampler
from adakron.engine.engine import TrainingEngine
from adakron.errors import NumericalError
from adakron.evaluator import Evaluator, evaluation_prefix
from adakron.metrics import MetricRecorder, peak_memory_mib
from adakron.nonfinite import Evidence, NonFiniteSteps
from adakron.passes import BeforePass, StepLosses, StepPasses
from adakron.progress import TrainingProgress
from adakron.spikes import LossSpikes
from adakron.tasks.base import EncodedSplit, Task

LOWER_IS_BETTER = ("loss", "mse", "mae", "perplexity")

SaveCheckpoint = Callable[[int, Mapping[str, Tensor], dict[str, Any]], None]
"""Called on every rank with (global step, trainable tensors, trainer state)."""


@dataclass
class TrainState:
    """Where training stands; written as trainer_state.json."""

    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = 0
    skipped_steps: int = 0
    nonfinite_steps: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    metric_for_best_model: str = ""
    log_history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """What training ended with.

    tensors: the trainable parameters to keep, the best where load_best_model_at_end asked for them. loss: mean over all
    steps. seconds: training alone, without evaluation and saving. samples, tokens: seen, without padding.
    scores: the evaluation of exactly these tensors, with prefixes; None where training never evaluated them.
    """

    tensors: Mapping[str, Tensor]
    loss: float
    seconds: float
    samples: int
    tokens: int
    state: TrainState
    scores: Mapping[str, float] | None


def total_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run."""
    return training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)


class Trainer:
    """Runs the loop: micro-batches, steps, logging, evaluation, checkpoints, the best adapter.

    evaluations: encoded splits to score, by split name; the first one decides what is best.
    before_pass: see `passes.BeforePass`. evidence: where steps that are not finite are kept.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        task: Task,
        sampler: GlobalBatchSampler,
        train: EncodedSplit,
        evaluations: Mapping[str, EncodedSplit],
        training: TrainingConfig,
        *,
        evaluator: Evaluator,
        recorder: MetricRecorder,
        pad_token_id: int,
        save_checkpoint: SaveCheckpoint,
        before_pass: BeforePass | None = None,
        evidence: Evidence | None = None,
    ):
        self._engine = engine
        self._sampler = sampler
        self._train = train
        self._evaluations = evaluations
        self._training = training
        self._evaluator = evaluator
        self._recorder = recorder
        self._save_checkpoint = save_checkpoint
        self._passes = StepPasses(
            engine, task, train, pad_token_id=pad_token_id, consistency_weight=training.consistency_weight, before_pass=before_pass
        )
        self._nonfinite = NonFiniteSteps(engine, self._passes, training.on_nonfinite, evidence)
        self._spikes = LossSpikes()
        self._total = total_steps(training, sampler.steps_per_epoch)
        self._state = TrainState(max_steps=self._total, metric_for_best_model=best_metric_name(training, task))
        self._best: Mapping[str, Tensor] | None = None
        self._best_scores: Mapping[str, float] | None = None
        self._last_scores: tuple[int, Mapping[str, float]] | None = None
        self._progress = TrainingProgress(self._total, training.disable_tqdm)
        self._seconds = 0.0
        self._samples = self._tokens = 0
        self._loss_sum = 0.0
        self._logged_step = 0
        self._window = (0.0, 0, 0)  # seconds, samples, tokens at the last log line

    def run(self) -> TrainResult:
        """Train to the last step. All ranks together."""
        self._engine.train()
        started = time.perf_counter()
        for epoch in itertools.count():
            for index, batch in enumerate(self._sampler.epoch(epoch)):
                applied = self._step(batch)
                epoch_ends = index + 1 == self._sampler.steps_per_epoch
                if not (applied or (epoch_ends and self._engine.global_step)):
                    continue  # an overflow, or a step that is not finite: counted, the schedule stands still
                self._state.epoch = epoch + (index + 1) / self._sampler.steps_per_epoch
                step = self._engine.global_step
                last = applied and step == self._total
                if applied:
                    self._progress.advance()
                if applied and (step % self._training.logging_steps == 0 or last):
                    self._seconds += time.perf_counter() - started
                    self._log(step)
                    started = time.perf_counter()
                eval_every = self._training.eval_steps or self._training.logging_steps
                evaluate = self._due(self._training.eval_strategy, eval_every, epoch_ends, applied)
                save = self._due(self._training.save_strategy, self._training.save_steps or 500, epoch_ends, applied)
                if evaluate or save:
                    self._seconds += time.perf_counter() - started
                    if evaluate:
                        self._evaluate(step)
                    if save:
                        self._save(step)
                    started = time.perf_counter()
                if last:
                    return self._finish()
        raise AssertionError("unreachable: the last step returns")

    def _step(self, batch: GlobalBatch) -> bool:
        learning_rate = self._engine.learning_rate
        losses = self._applied(batch)
        if losses is None:
            return False
        loss = losses.loss / max(1, losses.targets)
        self._recorder.record("train/loss", loss, "sum")
        self._spikes.record(loss)
        if self._training.consistency_weight:
            self._recorder.record("train/consistency", losses.disagreement / max(1, losses.targets), "sum")
        self._recorder.record("train/learning_rate", learning_rate, "last")
        if self._engine.grad_norm is not None:
            self._recorder.record("train/grad_norm", self._engine.grad_norm)
        self._samples += len(batch.examples)
        self._tokens += int(self._train.lengths[batch.examples].sum())
        return True

    def _applied(self, batch: GlobalBatch) -> StepLosses | None:
        """Compute and take a step; its losses, or None where it was not taken."""
        losses = self._passes.gradient(batch)
        try:
            applied = self._engine.step()
        except NumericalError as error:
            raise self._nonfinite.explain(batch, str(error)) from error
        taken = losses if applied else self._nonfinite.examine(batch, losses)
        if taken is not None:
            self._nonfinite.passed()
        return taken

    def _due(self, when: Interval, every: int, epoch_ends: bool, applied: bool) -> bool:
        step = self._engine.global_step
        if when == "no":
            return False
        if when == "epoch" and epoch_ends:
            return True
        return applied and (step == self._total or (when == "steps" and step % every == 0))

    def _log(self, step: int) -> None:
        seconds, samples, tokens = self._window
        elapsed = max(1e-9, self._seconds - seconds)
        self._recorder.record("train/samples_per_second", (self._samples - samples) / elapsed)
        self._recorder.record("train/tokens_per_second", (self._tokens - tokens) / elapsed)
        self._recorder.record("train/loss_scale", self._engine.loss_scale)
        self._recorder.record("train/peak_memory_mib", peak_memory_mib(self._engine.device), "max")
        self._recorder.record("train/epoch", self._state.epoch)
        self._recorder.record("train/loss_spike", self._spikes.flush())
        self._recorder.record("train/nonfinite_steps", self._nonfinite.skipped)
        values = self._recorder.flush()
        self._window = (self._seconds, self._samples, self._tokens)
        self._loss_sum += values["train/loss"] * (step - self._logged_step)
        self._logged_step = step
        self._recorder.write(step, values)
        self._remember(step, {name.removeprefix("train/"): value for name, value in values.items()})
        shown = ("train/loss", "train/grad_norm", "train/learning_rate", "train/samples_per_second")
        self._progress.report(step, {name: values[name] for name in shown if name in values})

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        self._state.global_step = step
        self._state.skipped_steps = self._engine.skipped_steps
        self._state.nonfinite_steps = self._nonfinite.skipped
        self._state.log_history.append({"step": step, "epoch": round(self._state.epoch, 4), **values})

    def evaluate(self) -> dict[str, float]:
        """Score every evaluation split with the parameters as they are; metrics with their prefixes, equal on all ranks.

        Leaves the model in evaluation mode.
        """
        self._engine.eval()
        values: dict[str, float] = {}
        for split, encoded in self._evaluations.items():
            prefix = evaluation_prefix(split)
            started = time.perf_counter()
            scores = self._evaluator.score(self._engine, split, encoded)
            seconds = time.perf_counter() - started
            values |= {f"{prefix}{name}": value for name, value in scores.items()}
            cost = {"runtime": seconds, "samples": len(encoded), "samples_per_second": len(encoded) / seconds}
            values |= {f"{prefix}{name}": float(value) for name, value in cost.items()}
            self._recorder.write(self._engine.global_step, {f"{prefix[:-1]}/{name}": value for name, value in scores.items()})
            text = "  ".join(f"{prefix}{name} {value:.4f}" for name, value in scores.items())
            self._progress.say(f"step {self._engine.global_step}/{self._total}  {text}")
        return values

    def _evaluate(self, step: int) -> None:
        values = self.evaluate()
        self._engine.train()
        self._remember(step, values)
        self._last_scores = (step, values)
        metric = values[f"eval_{self._state.metric_for_best_model}"]
        best = self._state.best_metric
        sign = 1.0 if greater_is_better(self._training, self._state.metric_for_best_model) else -1.0
        if best is None or sign * metric > sign * best:
            self._state.best_metric, self._state.best_step = metric, step
            if self._training.load_best_model_at_end:
                self._best, self._best_scores = self._engine.trainable_tensors(), values

    def _save(self, step: int) -> None:
        self._state.global_step = step
        self._save_checkpoint(step, self._engine.trainable_tensors(), vars(self._state))

    def _finish(self) -> TrainResult:
        self._progress.close()
        scores = None
        if self._best is not None:
            self._engine.load_for_evaluation(self._best)
            scores = self._best_scores
        elif self._last_scores is not None and self._last_scores[0] == self._total:
            scores = self._last_scores[1]
        tensors = self._best if self._best is not None else self._engine.trainable_tensors()
        self._engine.eval()
        return TrainResult(
            tensors=tensors,
            loss=self._loss_sum / self._total,
            seconds=self._seconds,
            samples=self._samples,
            tokens=self._tokens,
            state=self._state,
            scores=scores,
        )


def best_metric_name(training: TrainingConfig, task: Task) -> str:
    """The metric that decides what is best, without the prefix eval_."""
    return (training.metric_for_best_model or task.metric_for_best).removeprefix("eval_")


def greater_is_better(training: TrainingConfig, metric: str) -> bool:
    """Whether a larger value of the metric is better."""
    return metric not in LOWER_IS_BETTER if training.greater_is_better is None else training.greater_is_better
