"""One writer per run folder: a lock that the operating system takes back when its holder dies, however it dies."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from adakron.errors import ConfigError
from adakron.log import get_logger

LOCK_FILE = ".lock"
"""Stays in the folder when the lock is free: to delete it would let two writers lock two files of one name."""

# What a file system answers that has no locks (some network ones).
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
# `check_unlocked` of another process holds the lock for microseconds.
_PATIENCE_SECONDS = 0.5
_ELSEWHERE = "name another folder (of a training: --output_dir)"

logger = get_logger(__name__)


class RunLock:
    """The lock of a run folder, held from its making to `release`, the end of its `with` block, or the end of the process.

    Raises ConfigError naming the host and process that hold it, or where the folder cannot be written. A file system without locks is
    a warning: then nothing keeps two runs apart. Processes forked from the holder hold it, too.

    elsewhere: the remedy of a program that could write to another folder as well; None where it must be this one.
    """

    def __init__(self, folder: Path, elsewhere: str | None = _ELSEWHERE):
        file = folder / LOCK_FILE
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be locked for writing ({error.strerror}): who writes there needs a lock; change its permissions"
                + (f", or {elsewhere}" if elsewhere else "")
            ) from error
        try:
            self._acquire(folder, elsewhere)
        except BaseException:
            self.release()
            raise

    def _acquire(self, folder: Path, elsewhere: str | None) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _taken(folder, elsewhere) from None
                time.sleep(0.02)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise ConfigError(f"{folder} cannot be locked ({error.strerror}); {elsewhere or 'look at its file system'}") from error
                logger.warning("%s is on a file system without locks (%s): start no second run in it", folder, error.strerror)
                break
        # For the message of whoever comes second; a full disk must not keep the first one from starting.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n", 0)

    def release(self) -> None:
        """Let the next writer in. Once is enough, twice does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def check_unlocked(folder: Path) -> None:
    """Raise ConfigError where a writer holds the folder. Changes nothing, and keeps nothing: lock it before writing."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return  # never locked, or not ours to read: making the lock will tell
    try:
        # Shared: the ranks of one run look at the same moment.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(folder, _ELSEWHERE) from None
    except OSError:
        return
    finally:
        os.close(descriptor)


def _taken(folder: Path, elsewhere: str | None) -> ConfigError:
    try:
        holder = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return ConfigError(
        f"{folder} is being written by {who}: one run at a time may write a folder; wait for it, "
        + (f"end it, or {elsewhere}" if elsewhere else "or end it")
    )
