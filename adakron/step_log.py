"""What a run says of its steps: recorded at each, reduced and written at every logging step."""

from adakron import distributed
from adakron.engine.engine import TrainingEngine
from adakron.heartbeat import Heartbeat
from adakron.metrics import MetricRecorder, peak_memory_mib
from adakron.passes import StepLosses
from adakron.spikes import LossSpikes
from adakron.stragglers import ComputeClock, straggler
from adakron.train_state import Sums


class StepLog:
    """Metrics of training. consistency: whether a disagreement is among them. clock: see `StepPasses.clock`."""

    def __init__(self, engine: TrainingEngine, recorder: MetricRecorder, clock: ComputeClock, heartbeat: Heartbeat, *, consistency: bool):
        self._engine = engine
        self._recorder = recorder
        self._clock = clock
        self._heartbeat = heartbeat
        self._consistency = consistency
        self.spikes = LossSpikes()

    def record(self, losses: StepLosses, learning_rate: float) -> None:
        """Keep what a step that was taken gave, without waiting for the device. learning_rate: that of the step."""
        targets = max(1, losses.targets)
        self._recorder.record("train/loss", losses.loss / targets, "sum")
        self.spikes.record(losses.loss / targets)
        if self._consistency:
            self._recorder.record("train/consistency", losses.disagreement / targets, "sum")
        self._recorder.record("train/learning_rate", learning_rate, "last")
        if self._engine.grad_norm is not None:
            self._recorder.record("train/grad_norm", self._engine.grad_norm)

    def write(self, step: int, sums: Sums, epoch: float, nonfinite_steps: int) -> dict[str, float]:
        """Reduce and write what came since the last time; the values, equal on all ranks, which must call it together.

        sums: those of the run, whose window and loss move on.
        """
        seconds, samples, tokens = sums.window
        elapsed = max(1e-9, sums.seconds - seconds)
        self._recorder.record("train/samples_per_second", (sums.samples - samples) / elapsed)
        self._recorder.record("train/tokens_per_second", (sums.tokens - tokens) / elapsed)
        self._recorder.record("train/loss_scale", self._engine.loss_scale)
        self._recorder.record("train/peak_memory_mib", peak_memory_mib(self._engine.device), "max")
        self._recorder.record("train/epoch", epoch)
        self._recorder.record("train/loss_spike", self.spikes.flush())
        self._recorder.record("train/nonfinite_steps", nonfinite_steps)
        slowest = straggler(self._clock.flush())
        self._recorder.record("train/compute_seconds", slowest.median)
        if distributed.world_size() > 1:
            self._recorder.record("train/straggler_seconds", slowest.seconds)
            self._recorder.record("train/straggler_rank", slowest.rank)
        values = self._recorder.flush()
        self._heartbeat.logged(values["train/loss"], elapsed / max(1, step - sums.logged_step), slowest)
        sums.window = (sums.seconds, sums.samples, sums.tokens)
        sums.loss_sum += values["train/loss"] * (step - sums.logged_step)
        sums.logged_step = step
        self._recorder.write(step, values)
        return values
