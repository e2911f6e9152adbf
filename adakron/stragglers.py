"""How long each rank computes for a step, and which one the others wait for.

All ranks leave a step together, so the time of a step says nothing of who is slow. What differs is how long each computes before it
has its gradient: collating, forward pass, backward pass. The reduction, in which the fast ones wait, comes behind that. (At ZeRO-3
both passes also gather weights and wait there, and under ZeRO-1 and 2 a bucket that is full in the middle of a backward pass is
reduced there: it then shows less slow than it is.)
"""

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Variable

from adakron import distributed


class ComputeClock:
    """Adds up the seconds that this rank computes: on a GPU those of its stream, on a host those of the clock."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._steps = 0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._begun: torch.cuda.Event | float = 0.0

    def start(self) -> None:
        """Before a micro-batch is collated."""
        self._begun = self._now()

    def stop_behind(self, loss: Tensor) -> None:
        """Stop when the backward pass of this loss, which is still to come, has walked the whole graph, and nothing is reduced yet."""
        # The engine of autograd calls what is queued at the end of the walk in the order of queueing; DeepSpeed queues its own later.
        loss.register_hook(lambda _: Variable._execution_engine.queue_callback(self._stop))

    def _now(self) -> "torch.cuda.Event | float":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _stop(self) -> None:
        begun, ended = self._begun, self._now()
        if isinstance(begun, float) and isinstance(ended, float):
            self._seconds += ended - begun
        elif isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
            self._events.append((begun, ended))
            self._take(wait=False)  # what is over, so that their number does not grow with the distance of log lines

    def _take(self, *, wait: bool) -> None:
        while self._events and (wait or self._events[0][1].query()):
            begun, ended = self._events.popleft()
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1e3

    def count_step(self) -> None:
        """The micro-batches of a step are over."""
        self._steps += 1

    def flush(self) -> float:
        """Seconds per step since the last flush. Waits for the device."""
        self._take(wait=True)
        seconds = self._seconds / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        return seconds


@dataclass(frozen=True)
class Straggler:
    """The rank that computed longest. seconds: how much longer than the median rank, per step. median: what that one needs."""

    rank: int
    seconds: float
    median: float


def straggler(seconds: float) -> Straggler:
    """The slowest rank, equal on all. seconds: what this rank computed, per step. All ranks together.

    The median is the lower one of two, so of two ranks it is the faster one's.
    """
    by_rank = torch.zeros(distributed.world_size(), dtype=torch.float64)
    by_rank[distributed.rank()] = seconds
    distributed.all_reduce_sum(by_rank)
    slowest, median = int(by_rank.argmax()), float(by_rank.median())
    return Straggler(slowest, float(by_rank[slowest]) - median, median)
