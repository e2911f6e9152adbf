"""The training loop. It knows an engine and a task, and neither a model nor an adapter."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from adakron import distributed
from adakron.config import Interval, TrainingConfig
from adakron.data.sampler import GlobalBatch, GlobalBatchSampler
from adakron.engine.engine import TrainingEngine
from adakron.errors import NumericalError
from adakron.evaluator import Evaluator, best_metric_name, evaluation_prefix, greater_is_better
from adakron.fitting import MicroBatchFit, fit_micro_batch
from adakron.heartbeat import Heartbeat
from adakron.invariance import verify_batch_invariance
from adakron.metrics import MetricRecorder
from adakron.nonfinite import Evidence, NonFiniteSteps
from adakron.passes import BeforePass, StepLosses, StepPasses
from adakron.progress import TrainingProgress
from adakron.step_log import StepLog
from adakron.tasks.base import EncodedSplit, Task
from adakron.train_state import Due, RankState, Snapshot, Sums, TrainResult, TrainState, random_states, restore_rank, take

SaveCheckpoint = Callable[[Callable[[], Snapshot]], None]
"""Called on every rank, with what takes the snapshot, equal on all; may return before it is written.

It takes the snapshot only when it has room for it: the one before, which may still be under way to the disk, takes as much.
"""


def total_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run."""
    return training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)


class Trainer:
    """Runs the loop: micro-batches, steps, logging, evaluation, checkpoints, the best adapter.

    evaluations: encoded splits to score, by split name; the first one decides what is best.
    before_pass: see `passes.BeforePass`. boundary: passed before every step by all ranks alike; it may raise, as the evaluator's may.
    evidence: where steps that are not finite are kept. heartbeat: told what the run does.
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
        boundary: Callable[[], None] = lambda: None,
        evidence: Evidence | None = None,
        heartbeat: Heartbeat | None = None,
    ):
        self._engine = engine
        self._sampler = sampler
        self._train = train
        self._evaluations = evaluations
        self._training = training
        self._evaluator = evaluator
        self._recorder = recorder
        self._heartbeat = heartbeat or Heartbeat()
        self._save_checkpoint = save_checkpoint
        self._boundary = boundary
        self._passes = StepPasses(
            engine, task, train, pad_token_id=pad_token_id, consistency_weight=training.consistency_weight, before_pass=before_pass
        )
        self._nonfinite = NonFiniteSteps(engine, self._passes, training.on_nonfinite, evidence)
        self._log = StepLog(engine, recorder, self._passes.clock, self._heartbeat, consistency=bool(training.consistency_weight))
        self._total = total_steps(training, sampler.steps_per_epoch)
        self._state = TrainState(max_steps=self._total, metric_for_best_model=best_metric_name(training, task))
        self._best: Mapping[str, Tensor] | None = None
        self._best_scores: Mapping[str, float] | None = None
        self._last_scores: tuple[int, Mapping[str, float]] | None = None
        self._progress = TrainingProgress(self._total, training.disable_tqdm)
        self._sums = Sums()
        self._due = Due()
        self._saved: tuple[int, Due] | None = None
        self._save_first = False
        self._last: Snapshot | None = None  # of the last step, once the best one's parameters stand in the model
        self._started: float | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._engine.global_step

    @property
    def owes_evaluation(self) -> bool:
        """Whether the evaluation of the newest step is still to be made, or was stopped."""
        return self._due.evaluation

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._total

    def resume(self, snapshot: Snapshot, *, saved: bool = True) -> None:
        """Go on from a snapshot of the same run, whatever its stage, precision and number of ranks. All ranks together, before `run`.

        saved: whether the run that goes on can find this snapshot again where it saves; else `run` saves it first.
        Raises CheckpointError where its parameters are not those that train here.
        """
        self._engine.load_state(snapshot.engine)
        self._state, self._sums, self._due = take(snapshot.train, snapshot.sums, snapshot.due)
        self._best, self._best_scores, self._last_scores = snapshot.best, snapshot.best_scores, snapshot.last_scores
        self._saved = (snapshot.step, dataclasses.replace(self._due)) if saved else None
        self._save_first = not saved
        self._progress.advance(snapshot.step)
        rank, ranks = distributed.rank(), distributed.world_size()
        unlogged, spikes = restore_rank(snapshot, rank, ranks, self._training.seed, self._engine.device)
        self._recorder.restore(unlogged)
        self._log.spikes.load_state(spikes)
        self._nonfinite.skipped = snapshot.train.nonfinite_steps

    def fit_micro_batch(self) -> MicroBatchFit:
        """Take smaller micro-batches where memory asks for it: `fitting.fit_micro_batch`. All ranks together, before `run`."""
        return fit_micro_batch(self._engine, self._passes, self._sampler, self._train)

    def run(self) -> TrainResult:
        """Train to the last step. All ranks together. What `boundary` raises passes through; `save` keeps what there is then."""
        if self._training.verify_batch_invariance:
            verify_batch_invariance(self._engine, self._passes, next(iter(self._sampler.epoch(0))))
        self._engine.train()
        if self._save_first:
            self.save()  # killed before its next checkpoint, the run would begin again at step 0
        self._heartbeat.doing("training")
        self._started = time.perf_counter()
        self._catch_up()
        if self._engine.global_step < self._total:
            self._epochs()
        return self._finish()

    def _epochs(self) -> None:
        for epoch in itertools.count(self._sums.epoch):
            for batch in self._sampler.epoch(epoch, self._sums.batches):
                self._boundary()
                applied = self._step(batch)
                self._sums.batches += 1
                epoch_ends = self._sums.batches == self._sampler.steps_per_epoch
                self._heartbeat.progress()
                if not (applied or (epoch_ends and self._engine.global_step)):
                    continue  # an overflow, or a step that is not finite: counted, the schedule stands still
                self._state.epoch = epoch + self._sums.batches / self._sampler.steps_per_epoch
                step = self._engine.global_step
                last = applied and step == self._total
                if applied:
                    self._progress.advance()
                if applied and (step % self._training.logging_steps == 0 or last):
                    with self._clock_stopped():
                        self._write_log(step)
                if applied:
                    self._heartbeat.step(step)  # behind the line of the step, if there is one
                eval_every = self._training.eval_steps or self._training.logging_steps
                self._due = Due(
                    evaluation=self._is_due(self._training.eval_strategy, eval_every, epoch_ends, applied),
                    checkpoint=self._is_due(self._training.save_strategy, self._training.save_steps or 500, epoch_ends, applied),
                )
                self._catch_up()
                if last:
                    return
            self._sums.epoch, self._sums.batches = epoch + 1, 0

    def _catch_up(self) -> None:
        """What is due at the step that is behind: also where a run goes on that was stopped before it was done."""
        if not (self._due.evaluation or self._due.checkpoint):
            return
        with self._clock_stopped():
            if self._due.evaluation:
                self._evaluate(self._engine.global_step)
                self._due.evaluation = False
            saved_owing = self._saved is not None and self._saved[0] == self._engine.global_step
            if self._due.checkpoint or saved_owing:
                self._due.checkpoint = False
                self.save()  # also anew: who goes on from a checkpoint that owes an evaluation makes it once more
        self._heartbeat.doing("training")

    def _stop_clock(self) -> None:
        if self._started is not None:
            self._sums.seconds += time.perf_counter() - self._started
            self._started = None

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        self._stop_clock()
        try:
            yield
        finally:
            self._started = time.perf_counter()

    def _step(self, batch: GlobalBatch) -> bool:
        learning_rate = self._engine.learning_rate
        losses = self._applied(batch)
        if losses is None:
            return False
        self._log.record(losses, learning_rate)
        self._sums.samples += len(batch.examples)
        self._sums.tokens += int(self._train.lengths[batch.examples].sum())
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

    def _is_due(self, when: Interval, every: int, epoch_ends: bool, applied: bool) -> bool:
        step = self._engine.global_step
        if when == "no":
            return False
        if when == "epoch" and epoch_ends:
            return True
        return applied and (step == self._total or (when == "steps" and step % every == 0))

    def _write_log(self, step: int) -> None:
        values = self._log.write(step, self._sums, self._state.epoch, self._nonfinite.skipped)
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
        self._heartbeat.doing("evaluating")
        self._engine.eval()
        values: dict[str, float] = {}
        found: dict[str, dict[str, float]] = {}
        for split, encoded in self._evaluations.items():
            prefix = evaluation_prefix(split)
            started = time.perf_counter()
            scores = self._evaluator.score(self._engine, split, encoded)
            seconds = time.perf_counter() - started
            values |= {f"{prefix}{name}": value for name, value in scores.items()}
            cost = {"runtime": seconds, "samples": len(encoded), "samples_per_second": len(encoded) / seconds}
            values |= {f"{prefix}{name}": float(value) for name, value in cost.items()}
            found[prefix] = scores
        # Only when all are there: an evaluation that is stopped is made again, as a whole.
        for prefix, scores in found.items():
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

    def save(self) -> None:
        """Hand over a checkpoint of this step, unless there is one or no step was taken. All ranks together, at a boundary."""
        step = self._engine.global_step
        if not step or self._saved == (step, self._due):
            return
        self._stop_clock()
        self._heartbeat.doing("saving")
        self._save_checkpoint(lambda: self._last or self._snapshot())
        self._saved = (step, dataclasses.replace(self._due))

    def _snapshot(self) -> Snapshot:
        self._state.global_step, self._state.skipped_steps = self._engine.global_step, self._engine.skipped_steps
        self._state.nonfinite_steps = self._nonfinite.skipped
        mine = RankState(random_states(self._engine.device), self._recorder.unlogged(), self._log.spikes.state())
        ranks = distributed.all_gather_object(mine)
        train, sums, due = take(self._state, self._sums, self._due)
        return Snapshot(self._engine.state(), train, sums, due, self._best, self._best_scores, self._last_scores, ranks)

    def _finish(self) -> TrainResult:
        self._stop_clock()
        self._progress.close()
        scores = None
        if self._best is not None:
            self._last = self._snapshot()
            self._engine.load_for_evaluation(self._best)
            scores = self._best_scores
        elif self._last_scores is not None and self._last_scores[0] == self._total:
            scores = self._last_scores[1]
        tensors = self._best if self._best is not None else self._engine.trainable_tensors()
        self._engine.eval()
        return TrainResult(
            tensors=tensors,
            loss=self._sums.loss_sum / self._total,
            seconds=self._sums.seconds,
            samples=self._sums.samples,
            tokens=self._sums.tokens,
            state=self._state,
            scores=scores,
        )
