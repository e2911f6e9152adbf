"""One writer per folder: named to the second one, and gone when it dies."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adakron import run_lock
from adakron.errors import ConfigError
from adakron.run_lock import LOCK_FILE, RunLock, check_unlocked
from tests.helpers.launch import ROOT

HERE = socket.gethostname()


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Iterator[int]:
    """Another process that holds the folder, by its id."""
    code = f"from pathlib import Path; from adakron.run_lock import RunLock; RunLock(Path({str(folder)!r})); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"\n")
            process.stdin.close()


def test_a_second_writer_is_told_who_is_there(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as holder:
        for attempt in (RunLock, check_unlocked):
            with pytest.raises(ConfigError, match=rf"is being written by process {holder} on {HERE}: one run at a time .*--output_dir"):
                attempt(tmp_path)
    # Its end opened the folder, and what it wrote there misleads nobody.
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path)
    check_unlocked(tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as holder:
        os.kill(holder, signal.SIGKILL)
        os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder
        check_unlocked(tmp_path)
        RunLock(tmp_path).release()


def test_looking_does_not_disturb(tmp_path: Path) -> None:
    check_unlocked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    lock = RunLock(tmp_path)
    lock.release()
    lock.release()
    looking = os.open(tmp_path / LOCK_FILE, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    check_unlocked(tmp_path)  # another rank looks at the same moment
    with pytest.raises(ConfigError):
        RunLock(tmp_path)  # ... but whoever looks for ever is in the way
    os.close(looking)
    RunLock(tmp_path).release()


def test_a_record_that_cannot_be_read_still_is_a_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / LOCK_FILE).write_text("{")
        with pytest.raises(ConfigError, match="being written by another process"):
            check_unlocked(tmp_path)


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    said: list[str] = []
    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(run_lock.logger, "warning", lambda text, *values: said.append(text % values))
    with RunLock(tmp_path):
        check_unlocked(tmp_path)
    assert said == [f"{tmp_path} is on a file system without locks (No locks available): start no second run in it"]


def test_other_errors_of_locking_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot be locked for writing \(No such file or directory\)"):
        RunLock(tmp_path / "none")

    def broken(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(ConfigError, match=r"cannot be locked \(Input/output error\)"):
        RunLock(tmp_path)
