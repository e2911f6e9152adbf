"""Taking turns: a contender waits at the begin of every round until it is its turn, and reports how long the round took."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

import torch

from adakron.metrics import peak_memory_mib


@dataclass(frozen=True)
class Round:
    """One timed pass. seconds: by the clock. peak_memory: of the process so far, in bytes (of the GPU where it trains there)."""

    seconds: float
    peak_memory: int


class Pace:
    """Told before every step, and at the end.

    steps: of a round. wait: returns when it is this contender's turn. report: told of every round, the untimed first one included.
    """

    def __init__(self, steps: int, wait: Callable[[], None], report: Callable[[Round], None]):
        self._steps = steps
        self._wait = wait
        self._report = report
        self._done = 0
        self._begun = 0.0

    def before_step(self) -> None:
        """A step begins. At the border of two rounds this waits."""
        if self._done % self._steps == 0:
            if self._done:
                self.end_round()
            self._wait()
            _synchronise()
            self._begun = time.perf_counter()
        self._done += 1

    def end_round(self) -> None:
        """Report the round that is behind; called by the contender after its last step alone."""
        _synchronise()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._report(Round(time.perf_counter() - self._begun, round(peak_memory_mib(device) * 2**20)))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def own_stdout() -> TextIO:
    """The standard output for our words alone: what libraries print goes to standard error from now on."""
    ours = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return ours
