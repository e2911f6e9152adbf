"""`heartbeat.json`: where a run is at this moment, for whoever looks from outside: a person, a scheduler, a script.

A run that stands still does not say so. Its file does: `last_progress_at` stays behind the clock by more than what it is `doing` takes.
"""

import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from adakron.log import get_logger
from adakron.patience import at_most
from adakron.run_folder import write_json
from adakron.stragglers import Straggler

Doing = Literal["starting", "training", "evaluating", "saving", "predicting", "finished", "stopped", "failed"]

EVERY_SECONDS = 5.0
"""At least between two writes of a run that goes on; what it does next is written at once."""

LAST_SECONDS = 2.0
"""How long a run that fails waits for its folder."""

logger = get_logger(__name__)


class Heartbeat:
    """Writes the file; without one (other ranks than 0) it does nothing.

    file: in the run's folder. max_steps: of the whole run. step: where it goes on. hosts: by rank.
    """

    def __init__(self, file: Path | None = None, max_steps: int = 0, hosts: Sequence[str] = (), step: int = 0):
        self._file = file
        self._hosts = hosts
        self._written = 0.0
        self._failing = False
        now = _clock()
        self._content: dict[str, Any] = {
            "doing": "starting", "step": step, "max_steps": max_steps, "loss": None, "last_step_at": None, "seconds_per_step": None,
            "straggler_rank": None, "straggler_host": None, "straggler_seconds": None,
            "last_progress_at": now, "written_at": now, "started_at": now,
            "ranks": len(hosts), "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        self._write()

    def doing(self, what: Doing) -> None:
        """What the run does from now on."""
        if self._content["doing"] != what:
            self._content["doing"] = what
            self._progress(at_once=True)

    def progress(self) -> None:
        """Something is done: a batch of an evaluation, a step that was not taken."""
        self._progress()

    def step(self, step: int) -> None:
        """So many optimizer steps are done."""
        self._content |= {"step": step, "last_step_at": _clock()}
        self._progress()

    def failed(self) -> None:
        """The run ends of an error, which may be that its folder does not answer."""
        at_most(LAST_SECONDS, lambda: self.doing("failed"))

    def logged(self, loss: float, seconds_per_step: float, slowest: Straggler) -> None:
        """What the newest log line says."""
        self._content |= {
            "loss": loss, "seconds_per_step": round(seconds_per_step, 6),
            "straggler_rank": slowest.rank, "straggler_host": self._hosts[slowest.rank] if self._hosts else None,
            "straggler_seconds": round(slowest.seconds, 6),
        }  # fmt: skip

    def _progress(self, *, at_once: bool = False) -> None:
        self._content["last_progress_at"] = _clock()
        if at_once or time.monotonic() - self._written >= EVERY_SECONDS:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._written = time.monotonic()
        self._content["written_at"] = _clock()
        try:
            # Not durable: it tells of a process that lives, and a run must not wait for the disk at every look.
            write_json(self._file, self._content, durable=False)
        except OSError as error:  # a full disk ends a run where something is lost by it, not here
            if not self._failing:
                logger.warning("%s could not be written (%s); it says where the run was before", self._file, error.strerror)
            self._failing = True
        else:
            self._failing = False  # a disk has room again: whoever takes an old file for a stall must not end this run


def _clock() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
