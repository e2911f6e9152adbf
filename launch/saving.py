"""What a run saves: adapter folders, and checkpoints that training can go on from, written beside it."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adakron import distributed, run_folder
from adakron.checkpoint import BackgroundWriter, read_training_state, write_training_state
from adakron.errors import CheckpointError
from adakron.tasks.base import Task
from adakron.train_state import Snapshot
from launch.attachment import Attachment


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that can be read, or None; and why newer ones cannot, by folder."""

    checkpoint: Path | None
    rejected: Mapping[Path, str]


def newest_good(folder: Path) -> Found:
    """Look through a run's checkpoints, newest first."""
    rejected: dict[Path, str] = {}
    for path in sorted(folder.glob(f"{run_folder.CHECKPOINT_PREFIX}*"), key=_step_of, reverse=True):
        if _step_of(path) < 0:
            continue
        try:
            read_training_state(path)
        except CheckpointError as error:
            rejected[path] = str(error)
        else:
            return Found(path, rejected)
    return Found(None, rejected)


def _step_of(path: Path) -> int:
    match = re.fullmatch(rf"{run_folder.CHECKPOINT_PREFIX}(\d+)", path.name)
    return int(match[1]) if match else -1


def write_checkpoint(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """A checkpoint that is there whole or not at all, in place of one of the same step. fill: writes into the folder it is given."""
    target = folder / f"{run_folder.CHECKPOINT_PREFIX}{step}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    return target


class Saver:
    """Writes a run's folders. run: what must hold for a run that goes on from its checkpoints (`launch.resuming`)."""

    def __init__(
        self,
        folder: Path,
        attached: Attachment,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        keep: int | None,
        run: Mapping[str, Any],
    ):
        self._folder = folder
        self._attached = attached
        self._tokenizer = tokenizer
        self._task = task
        self._keep = keep
        self._run = run
        self._writer = BackgroundWriter()

    def adapter(self, target: Path, trained: Mapping[str, Tensor], *, merge: bool = False) -> None:
        """Adapter, head and tokenizer into an existing folder. Rank 0 only."""
        options = self._task.model_options()
        self._attached.folder.write(target, trained, auto_class=self._task.auto_class, model_options=options, merge=merge)
        self._tokenizer.save_pretrained(target)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Begin to write checkpoint-<step>. All ranks together; CheckpointError on all where the one before failed."""
        self.wait()
        if distributed.rank() == 0:
            self._writer.submit(f"{run_folder.CHECKPOINT_PREFIX}{snapshot.step} of {self._folder}", lambda: self._write(snapshot))

    def wait(self) -> None:
        """Wait until every checkpoint is written. All ranks together; CheckpointError on all where one failed."""
        distributed.on_rank_0(self._writer.wait)

    def _write(self, snapshot: Snapshot) -> None:
        def fill(target: Path) -> None:
            self.adapter(target, snapshot.engine.tensors["master"])
            write_training_state(target, snapshot, self._run)

        write_checkpoint(self._folder, snapshot.step, fill)
        run_folder.prune_checkpoints(self._folder, self._keep, snapshot.train.best_step)
