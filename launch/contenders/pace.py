"""Taking turns: a contender waits at the beginning of every round until it is its turn, and reports how long the round took."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

import torch

from adakron.metrics import peak_memory_mib
from launch.contenders.phases import Phases, synchronise
from launch.contenders.workload import Workload


@dataclass(frozen=True)
class Round:
    """One pass. seconds: by the clock. peak_memory: of the process so far, in bytes (of the GPU where it trains there).

    start_seconds: from the start of the process to the end of its first optimizer step. phases: `Phases.medians` of the traced round.
    """

    seconds: float
    peak_memory: int
    start_seconds: float
    phases: dict[str, float] = field(default_factory=dict)


class Pace:
    """Told before every step, and at the end: first a round to warm up, then the timed ones, then the traced one.

    wait: returns when it is this contender's turn. report: told of every round. started: `time.monotonic` when the process was
    started, by whoever started it.
    """

    def __init__(self, workload: Workload, wait: Callable[[], None], report: Callable[[Round], None], started: float):
        self._workload = workload
        self._wait = wait
        self._report = report
        self._started = started
        self._done = 0
        self._begun = 0.0
        self._start_seconds = 0.0
        self.phases = Phases()
        self.instrument: Callable[[Phases], None] = lambda phases: None
        """Called at the beginning of the traced round; wraps what belongs to a phase."""

    def before_step(self) -> None:
        """A step begins. At the border of two rounds this waits."""
        if self._done == 1:
            synchronise()
            self._start_seconds = time.monotonic() - self._started
        if self._done % self._workload.steps_per_round == 0:
            if self._done:
                self.end_round()
            self._wait()
            if self._done == self._workload.total_steps - self._workload.steps_per_round:
                self.phases.on = True
                self.instrument(self.phases)
            synchronise()
            self._begun = time.perf_counter()
        self.phases.step()
        self._done += 1

    def end_round(self) -> None:
        """Report the round that is behind; called by the contender after its last step alone."""
        phases = {}
        if self.phases.on:
            self.phases.end()
            phases, self.phases.on = self.phases.medians(), False
        self._tell(phases)

    def evaluation(self, prepare: Callable[[], Callable[[], object]]) -> None:
        """Rounds of scoring, after those of training, where they are asked for. prepare: returns what scores the split once; it is
        called when it is this contender's turn, and its own time is not counted.
        """
        if not self._workload.evaluation_examples:
            return
        self._wait()
        score = prepare()
        for turn in range(self._workload.rounds + 1):
            if turn:
                self._wait()
            synchronise()
            self._begun = time.perf_counter()
            score()
            self._tell({})

    def _tell(self, phases: dict[str, float]) -> None:
        synchronise()
        seconds = time.perf_counter() - self._begun
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._report(Round(seconds, round(peak_memory_mib(device) * 2**20), self._start_seconds, phases))


def own_stdout() -> TextIO:
    """The standard output for our words alone: what libraries print goes to standard error from now on."""
    ours = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return ours
