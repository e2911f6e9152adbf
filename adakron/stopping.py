"""Stopping in step: what any rank was asked, all ranks decide at the same boundary.

A boundary is a place that every rank passes equally often: between two steps, between two batches of an evaluation. Each starts a
reduction of one number on a host group of its own and looks at the result of the one before, which had a whole step's time: the
step does not wait, and the decision comes one boundary late, on all ranks alike, whichever ranks a signal reached and when.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

from adakron import distributed
from adakron.signals import LAUNCHER_GONE, REASONS, SignalListener

_BUDGET = len(REASONS) + 1


class StopRequest(Exception):
    """Raised on all ranks at the same boundary. Not an error: the run can go on later. str(): what asked."""


class StopAgreement:
    """Passes the boundaries of one run. max_hours: rank 0's wall-clock budget, from the moment that the listener was made."""

    def __init__(self, listener: SignalListener, max_hours: float | None = None):
        self._listener = listener
        self._deadline = listener.started + max_hours * 3600 if max_hours is not None and distributed.rank() == 0 else None
        self._max_hours = max_hours
        alone = distributed.world_size() == 1
        # Its own group: a collective that is still under way must not come between those of a step.
        self._group: Any = None if alone else dist.new_group(backend="gloo")
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._agreed = False
        watch = distributed.peer_watch()
        if watch is not None:
            # Not for every signal: a launcher that ends the others of a lost rank sends one, too.
            watch.let_stop(lambda: self._agreed or listener.asked == LAUNCHER_GONE)

    def now(self) -> None:
        """Ask all ranks and wait for the answer; StopRequest where one was asked to stop."""
        wish = torch.tensor([self._wish()])
        if self._group is not None:
            dist.all_reduce(wish, op=dist.ReduceOp.MAX, group=self._group)
        self._raise(int(wish))

    def boundary(self) -> None:
        """Pass a boundary; StopRequest where a rank had been asked by the one before it."""
        wish = torch.tensor([self._wish()])
        if self._group is None:
            self._raise(int(wish))
            return
        before, self._pending = self._pending, (dist.all_reduce(wish, op=dist.ReduceOp.MAX, group=self._group, async_op=True), wish)
        if before is not None:
            work, answer = before
            work.wait()
            self._raise(int(answer))

    def _wish(self) -> int:
        if self._listener.asked is not None:
            return REASONS.index(self._listener.asked) + 1
        return _BUDGET if self._deadline is not None and time.monotonic() >= self._deadline else 0

    def _raise(self, answer: int) -> None:
        self._agreed = answer != 0
        if answer == _BUDGET:
            raise StopRequest(f"max_hours {self._max_hours:g}")
        if answer:
            raise StopRequest(REASONS[answer - 1])
