"""What a training run keeps of a step that is not finite, for `launch/train.py --replay FILE`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from adakron import run_folder
from adakron.config import RunConfig
from adakron.dumps import StepDump, write_dump
from adakron.redaction import redact_values
from adakron.tasks.base import Task


class RunEvidence:
    """Keeps such steps in the run's folder. See `adakron.nonfinite.Evidence`. newest: its newest good checkpoint, on rank 0."""

    def __init__(self, folder: Path, config: RunConfig, precision: str, task: Task, newest: Callable[[], Path | None]):
        self._folder = folder
        self._newest = newest
        self._run = redact_values({
            "config": config.to_dict(), "precision": precision, "auto_class": task.auto_class, "model_options": task.model_options(),
            **run_folder.environment(),
        })  # fmt: skip

    def keep(self, dump: StepDump) -> Path:
        """Write the step into the run's folder, under a name of its own."""
        self._folder.mkdir(parents=True, exist_ok=True)  # hosts may have their own disks
        file = run_folder.free_name(self._folder / dump.name)
        write_dump(dataclasses.replace(dump, run=self._run), file)
        return file

    def last_good(self) -> Path | None:
        """The newest checkpoint that can be resumed from."""
        return self._newest()
