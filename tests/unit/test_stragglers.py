"""What a rank computes, without what it waits for; and which of several computes longest."""

import time

import pytest
import torch
import torch.distributed as dist

from adakron import stragglers
from adakron.stragglers import ComputeClock, Lag


class Slow(torch.autograd.Function):
    """Takes a while in both passes."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


def test_the_clock_runs_from_the_batch_to_the_end_of_the_backward_pass():
    clock = ComputeClock(torch.device("cpu"))
    leaf = torch.ones(1, requires_grad=True)
    for _ in range(2):
        clock.start()
        time.sleep(0.05)  # collating
        loss = Slow.apply(leaf, 0.1).sum()
        clock.stop_behind(loss)
        # As DeepSpeed does: what a rank waits for comes when the walk is over.
        (loss * 3).register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: time.sleep(0.4)))
        loss.backward()
    time.sleep(0.4)  # the optimizer, the others
    assert 0.5 <= clock.flush() < 0.8  # twice 0.05 + 0.1 + 0.1
    assert clock.flush() == 0


def test_a_callback_that_is_queued_in_the_walk_comes_after_the_clock_stopped():
    clock = ComputeClock(torch.device("cpu"))
    leaf = torch.ones(1, requires_grad=True)
    clock.start()
    loss = leaf * 2
    clock.stop_behind(loss)
    leaf.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: time.sleep(0.3)))
    loss.backward()
    assert clock.flush() < 0.2


@pytest.mark.parametrize(
    ("seconds", "expected"), [([0.2, 0.5], Lag(1, 0.3, 0.2)), ([0.9, 0.2, 0.3], Lag(0, 0.6, 0.3)), ([0.4], Lag(0, 0.0, 0.4))]
)
def test_the_slowest_of_several(monkeypatch, seconds, expected):
    monkeypatch.setattr(stragglers.distributed, "world_size", lambda: len(seconds))

    def together(mine):
        mine.copy_(torch.tensor(seconds, dtype=torch.float64))
        return mine

    monkeypatch.setattr(stragglers.distributed, "all_reduce_sum", together)
    found = stragglers.lag(seconds[0])
    assert found.rank == expected.rank
    assert (found.seconds, found.median) == pytest.approx((expected.seconds, expected.median))
    assert not dist.is_initialized()
