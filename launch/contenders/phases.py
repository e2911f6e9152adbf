"""Where the time of a step goes: its phases, measured in a round of their own, for which a contender's calls are wrapped."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "optimizer", "log")
"""data: choosing examples, padding them, moving them to the device. optimizer: reducing the gradient, clipping, update, schedule."""


def synchronise() -> None:
    """Wait for the GPU, where there is one: what was asked of it is then done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Phases:
    """Adds up the seconds of each phase of each step while `on`; else it costs nothing worth naming."""

    def __init__(self) -> None:
        self.on = False
        self._steps: list[dict[str, float]] = []
        self._begun = 0.0

    def step(self) -> None:
        """A step begins, and the one before is over."""
        if self.on:
            self.end()
            self._steps.append({})

    def end(self) -> None:
        """The last step is over."""
        synchronise()
        now = time.perf_counter()
        if self._steps:
            self._steps[-1]["step"] = now - self._begun
        self._begun = now

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Around what belongs to a phase."""
        if not self.on:
            yield
            return
        synchronise()
        begun = time.perf_counter()
        yield
        synchronise()
        self._steps[-1][phase] = self._steps[-1].get(phase, 0.0) + time.perf_counter() - begun

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Let what `owner` (an object or a module) calls by that name belong to a phase from now on."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(phase):
                return original(*args, **kwargs)

        setattr(owner, name, timed)

    def medians(self) -> dict[str, float]:
        """In milliseconds: the whole "step", each phase over the steps that had it, and the "rest", what no phase has of a step."""
        if not self._steps:
            return {}
        rests = [2 * step["step"] - sum(step.values()) for step in self._steps]  # the sum has the whole step in it, too
        found = {name: [step[name] for step in self._steps if name in step] for name in ("step", *PHASES)} | {"rest": rests}
        return {name: 1e3 * statistics.median(seconds) for name, seconds in found.items() if seconds}
