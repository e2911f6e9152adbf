"""The checkpoints of a run: each whole or not there at all, the newest good one always found, whatever was killed or damaged.

The one writer holds the run's lock (`run_lock`); readers need none. Hidden names beside the checkpoints are a writer's work in
progress: `.checkpoint-<step>.staging` is being written, `.replaced` gives way to a new one of its step, `.deleted` is being deleted.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adakron.atomic import publish, published_name, rename_folder, sync_tree
from adakron.errors import AdaKronError, CheckpointError, ConfigError
from adakron.manifest import verify, write_manifest
from adakron.untrusted import read_text

CHECKPOINT_PREFIX = "checkpoint-"
LATEST_FILE = "latest"

_NUMBER = "(0|[1-9][0-9]*)"
_VISIBLE = re.compile(rf"{CHECKPOINT_PREFIX}{_NUMBER}")
_HIDDEN = re.compile(rf"\.{CHECKPOINT_PREFIX}{_NUMBER}\.(staging|replaced|deleted)")
# tokenizers and safetensors write in Rust, and raise classes of their own with the system's number in the message.
_RUST_ERROR = re.compile(r"\(os error ([0-9]+)\)")
_REMEDIES = {
    errno.ENOSPC: "free space on its disk (launch/checkpoints.py prune deletes old checkpoints)",
    errno.EDQUOT: "free space within your quota (launch/checkpoints.py prune deletes old checkpoints)",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "change the permissions of the folder",
    errno.EPERM: "change the permissions of the folder",
    errno.EROFS: "make its file system writable",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, good or not."""

    step: int
    path: Path

    @property
    def name(self) -> str:
        """checkpoint-<step>, also while a new one is taking its place."""
        return f"{CHECKPOINT_PREFIX}{self.step}"


@dataclass(frozen=True)
class Examined:
    """A checkpoint and what is wrong with it; no problems: it is good."""

    checkpoint: Checkpoint
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """checkpoint: the newest good one, None where there is none. rejected: the newer ones that are not, newest first."""

    checkpoint: Checkpoint | None
    rejected: tuple[Examined, ...]


class CheckpointStore:
    """The checkpoints in a run's folder. To make one reads and writes nothing."""

    def __init__(self, run_folder: Path):
        self._folder = run_folder

    def checkpoints(self) -> list[Checkpoint]:
        """All of them, by step, good or not. Raises CheckpointError where the folder cannot be read."""
        visible: dict[int, Path] = {}
        replaced: dict[int, Path] = {}
        try:
            entries = [entry for entry in _entries(self._folder) if entry.is_dir()]
        except FileNotFoundError:
            entries = []
        except OSError as error:
            raise CheckpointError(
                f"the checkpoints in {self._folder} cannot be listed ({error.strerror}): the newest good one is chosen among all of them; "
                "name a run's folder, and one that you may read"
            ) from error
        for entry in entries:
            if match := _VISIBLE.fullmatch(entry.name):
                visible[int(match[1])] = Path(entry.path)
            elif (match := _HIDDEN.fullmatch(entry.name)) and match[2] == "replaced":
                # Its writer was killed between two renames; where the new one is there, that one counts.
                replaced[int(match[1])] = Path(entry.path)
        return [Checkpoint(step, path) for step, path in sorted((replaced | visible).items())]

    def examined(self) -> Iterator[Examined]:
        """Every checkpoint with what is wrong with it, newest first; reads all their bytes, one at a time."""
        for checkpoint in reversed(self.checkpoints()):
            problems = verify(checkpoint.path)
            if problems and not checkpoint.path.exists():
                continue  # the run deleted it while we read
            yield Examined(checkpoint, tuple(problems))

    def newest_good(self) -> Found:
        """The newest checkpoint that is whole, by step: neither clocks nor `latest` count."""
        rejected: list[Examined] = []
        for one in self.examined():
            if not one.problems:
                return Found(one.checkpoint, tuple(rejected))
            rejected.append(one)
        return Found(None, tuple(rejected))

    @property
    def latest(self) -> Checkpoint | None:
        """The checkpoint that the file `latest` names, if that is there; unverified.

        It is a pointer for people and tools, written after its checkpoint: a killed writer leaves it one behind, damage leaves it on a
        bad one. What to resume from is `newest_good`.
        """
        try:
            name = read_text(self._folder / LATEST_FILE).strip()
        except (OSError, ValueError):
            return None
        return next((checkpoint for checkpoint in self.checkpoints() if checkpoint.name == name), None)

    def write(self, step: int, fill: Callable[[Path], None]) -> Checkpoint:
        """Make checkpoint-<step> of what `fill` writes into the empty folder it is given; the caller holds the run's lock.

        The checkpoint appears whole and on the disk, then `latest` names it. One of the same step gives way to it only then.
        Raises CheckpointError where the disk is full, or the folder cannot be written; every other error is that of `fill`. After any of
        them the checkpoints are those of before.
        """
        target = self._place(step)
        staging = self._place(step, "staging")
        with _explained(f"{target.name} could not be written to {self._folder}"):
            try:
                self._recover()
                staging.mkdir()
                fill(staging)
                sync_tree(staging)
                write_manifest(staging)
                if target.is_dir():
                    rename_folder(target, self._place(step, "replaced"))
                rename_folder(staging, target)
            except BaseException:
                with suppress(OSError):
                    self._recover()
                raise
        with _explained(f"{target.name} is written to {self._folder}, but {LATEST_FILE} there could not be"):
            with publish(self._folder / LATEST_FILE) as partial:
                partial.write_text(f"{target.name}\n", encoding="utf-8")
            self._recover()  # deletes the replaced one
        return Checkpoint(step, target)

    def prunable(self, keep: int, *also: int | None) -> list[Checkpoint]:
        """What `prune` would delete: all that are older than the newest `keep` good ones, but the steps of also. At least 1 is kept.

        Bad ones do not count, and go when they are older; newer than all good ones they stay, for whoever can save something.
        """
        if keep < 1:
            raise ConfigError(f"keep is {keep}: the last good checkpoint is never deleted; keep at least 1 (set --keep)")
        older, good = [], 0
        for checkpoint in reversed(self.checkpoints()):
            if good < keep:
                good += not verify(checkpoint.path)
            elif checkpoint.step not in also:
                older.append(checkpoint)
        return older[::-1]

    def prune(self, keep: int, *also: int | None) -> list[Checkpoint]:
        """Delete what `prunable` says, oldest first; the caller holds the run's lock. Returns what is gone.

        Each loses its name before its content, so that a killed prune leaves no half checkpoint. CheckpointError on failure.
        """
        with _explained(f"old checkpoints in {self._folder} could not be deleted", elsewhere=False):
            self._recover()
            gone = self.prunable(keep, *also)
            for checkpoint in gone:
                rename_folder(checkpoint.path, self._place(checkpoint.step, "deleted"))
                self._recover()
        return gone

    def _place(self, step: int, state: Literal["staging", "replaced", "deleted"] | None = None) -> Path:
        name = f"{CHECKPOINT_PREFIX}{step}"
        return self._folder / (f".{name}.{state}" if state else name)

    def _recover(self) -> None:
        """Finish what was begun, by this writer or a killed one: a checkpoint that lost its place gets it back, other leftovers go."""
        for entry in _entries(self._folder):
            match = _HIDDEN.fullmatch(entry.name)
            if match and match[2] == "replaced" and not os.path.lexists(self._place(int(match[1]))):
                rename_folder(Path(entry.path), self._place(int(match[1])))
            elif match and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif match or published_name(entry.name) == LATEST_FILE:
                os.unlink(entry.path)


def is_stores(entry: Path) -> bool:
    """Whether an entry of a run's folder is what a store makes there."""
    if entry.is_dir():
        return any(name.fullmatch(entry.name) for name in (_VISIBLE, _HIDDEN))
    return LATEST_FILE in (entry.name, published_name(entry.name))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


@contextmanager
def _explained(what: str, *, elsewhere: bool = True) -> Iterator[None]:
    """Turn the system's errors into a CheckpointError that says what failed, the rule and the remedy; others pass.

    elsewhere: another folder would do.
    """
    try:
        yield
    except AdaKronError:
        raise
    except Exception as error:
        rust = _RUST_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
        if number is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number else str(error)
        remedy = _REMEDIES.get(number or 0, "check its disk and file system")
        raise CheckpointError(
            f"{what} ({reason}): a checkpoint is saved whole or not at all, and the others are as they were; {remedy}"
            + (", or name another folder (--output_dir)" if elsewhere else "")
        ) from error
