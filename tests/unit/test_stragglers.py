"""What a rank computes, without what it waits for; and which of several computes longest."""

from typing import ClassVar

import pytest
import torch

from adakron import stragglers
from adakron.stragglers import ComputeClock, Straggler


class Time:
    """A clock that others move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    clock = Time()
    monkeypatch.setattr(stragglers.time, "perf_counter", clock)
    return clock


class Slow(torch.autograd.Function):
    """Takes 10 s forward and 100 s back."""

    @staticmethod
    def forward(ctx, x, time):
        ctx.time = time
        time.passes(10)
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        ctx.time.passes(100)
        return gradient, None


def test_the_clock_runs_from_the_batch_to_the_end_of_the_backward_pass(time):
    clock = ComputeClock(torch.device("cpu"))
    leaf = torch.ones(1, requires_grad=True)
    for _ in range(2):
        for _ in range(2):
            clock.start()
            time.passes(1)  # collating
            output = Slow.apply(leaf, time)
            # As DeepSpeed does, whose callback reduces: in the walk, at the model's output, which comes behind the loss.
            output.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: time.passes(1000)))
            loss = output.sum()
            clock.stop_behind(loss)
            (loss * 3).backward()
        clock.count_step()
        time.passes(10_000)  # the optimizer, the others
    assert clock.flush() == 2 * 111  # per step
    assert clock.flush() == 0


class Event:
    """A GPU's, of which the newest one is not over yet."""

    made: ClassVar[list["Event"]] = []

    def __init__(self, enable_timing):
        assert enable_timing
        self.made.append(self)

    def record(self):
        self.at = len(self.made)

    def query(self):
        return self is not self.made[-1]

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_on_a_gpu_events_that_are_over_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.made.clear()
    clock = ComputeClock(torch.device("cuda"))
    for _ in range(5):
        clock.start()
        loss = torch.ones(1, requires_grad=True) * 2
        clock.stop_behind(loss)
        loss.backward()
        assert len(clock._events) == 1
        clock.count_step()
    assert clock.flush() == 1.0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([0.2, 0.5], Straggler(1, 0.3, 0.2)), ([0.9, 0.2, 0.3], Straggler(0, 0.6, 0.3)), ([0.4], Straggler(0, 0.0, 0.4))],
)
def test_the_slowest_of_several(monkeypatch, seconds, expected):
    monkeypatch.setattr(stragglers.distributed, "world_size", lambda: len(seconds))

    def together(mine):
        mine.copy_(torch.tensor(seconds, dtype=torch.float64))
        return mine

    monkeypatch.setattr(stragglers.distributed, "all_reduce_sum", together)
    found = stragglers.straggler(seconds[0])
    assert found.rank == expected.rank
    assert (found.seconds, found.median) == pytest.approx((expected.seconds, expected.median))
