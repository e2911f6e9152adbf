"""What a run saves: adapter folders, and checkpoints that training can go on from, written beside it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adakron import distributed
from adakron.checkpoint import BackgroundWriter, newest_resumable, write_training_state
from adakron.store import CheckpointStore
from adakron.tasks.base import Task
from adakron.train_state import Snapshot
from launch.attachment import Attachment


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
        self._store = CheckpointStore(folder)
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

    def checkpoint(self, take: Callable[[], Snapshot]) -> None:
        """Begin to write checkpoint-<step>, taking the snapshot only when the one before is on the disk: the host holds one at a time.

        All ranks together; CheckpointError on all where the one before failed.
        """
        self.wait()
        snapshot = take()
        if distributed.rank() == 0:
            self._writer.submit(lambda: self._write(snapshot))

    def newest(self) -> Path | None:
        """The newest checkpoint that can be resumed from, the one under way included. CheckpointError where none can be looked for."""
        self._writer.settle()
        return newest_resumable(self._folder).checkpoint

    def settle(self) -> None:
        """Let a write under way end; the run may go on. This rank alone."""
        self._writer.settle()

    def close(self) -> None:
        """Let a write under way end, whatever ends the run: the folder's lock must outlast it. This rank alone."""
        self._writer.close()

    def wait(self) -> None:
        """Wait until every checkpoint is written. All ranks together; CheckpointError on all where one failed."""
        distributed.on_rank_0(self._writer.wait)

    def _write(self, snapshot: Snapshot) -> None:
        def fill(target: Path) -> None:
            self.adapter(target, snapshot.engine.tensors["master"])
            write_training_state(target, snapshot, self._run)

        self._store.write(snapshot.step, fill)
        if self._keep is not None:
            self._store.prune(self._keep, snapshot.train.best_step)
