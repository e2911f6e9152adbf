"""Training runs that are sent signals while they run, as schedulers, terminals and other processes send them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.launch import Finished, deepspeed_command, start

PATIENCE = 120.0
"""Seconds that anything here may take before it counts as hanging."""


@dataclass
class Running:
    """A run under way. folder: its output_dir."""

    process: "subprocess.Popen[str]"
    folder: Path

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in order of rank."""
        found = {"": psutil.Process(self.process.pid)}
        for child in found[""].children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {word: child for word in child.cmdline() if word.startswith("--local_rank=")}
        return [found[name] for name in sorted(found) if name or len(found) == 1]

    def logged(self) -> int:
        """Lines in metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) if file.exists() else 0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll; AssertionError where the run ends first, or nothing happens."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.finish().output
            assert time.monotonic() < deadline, "the run hangs"
            time.sleep(0.005)

    def wait_for_lines(self, more: int) -> None:
        """Wait until so many more lines of metrics are written."""
        before = self.logged()
        self.wait_until(lambda: self.logged() >= before + more)

    def finish(self) -> Finished:
        """Wait for the end."""
        stdout, stderr = self.process.communicate(timeout=PATIENCE)
        return Finished(self.process.returncode, stdout, stderr)


@contextlib.contextmanager
def running(folder: Path, arguments: Sequence[str], *, ranks: int = 1) -> Iterator[Running]:
    """`launch/train.py ARGUMENTS --output_dir FOLDER`: one rank without a launcher, several behind `deepspeed`."""
    words = [*arguments, "--output_dir", str(folder)]
    command = [sys.executable, "launch/train.py", *words] if ranks == 1 else deepspeed_command("launch/train.py", *words, ranks=ranks)
    process = start(command)
    try:
        yield Running(process, folder)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def send(run: Running, number: signal.Signals, *, to: Sequence[int] = (0, 1), skew: float = 0.0) -> None:
    """Send a signal to ranks, one after the other with so many seconds between. Those that are gone by then are left out."""
    ranks = run.ranks()
    for index, rank in enumerate(to):
        if index:
            time.sleep(skew)
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            ranks[rank].send_signal(number)
