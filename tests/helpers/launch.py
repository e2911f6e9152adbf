"""Start the real programs in processes of their own, and leave none behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    """A program that ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both streams, for assertion messages."""
        return f"exit {self.returncode}\n--- stdout\n{self.stdout[-6000:]}\n--- stderr\n{self.stderr[-6000:]}"


def free_port() -> int:
    """A port that nobody listens on. Test processes side by side draw from ports of their own, for it is taken only later."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port // 2 % workers == worker:  # Linux hands out ports of one parity first
            return port


def start(command: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """Begin what `run` runs to its end. The caller kills the session, `os.killpg(process.pid, ...)`."""
    environment = {**_environment(), **(env or {})}
    return subprocess.Popen(
        list(command), cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def run(command: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 240) -> Finished:
    """Run a command in a session of its own; whatever it started is killed with it. No network, two threads at most."""
    process = start(command, cwd=cwd, env=env)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        # The DeepSpeed launcher orphans its ranks when it dies: the whole session goes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, stdout, stderr)


def _environment() -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {
        **{key: value for key, value in os.environ.items() if key not in launcher},
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


@dataclass
class Rank:
    """A rank that no launcher looks after."""

    process: subprocess.Popen[bytes]
    log: Path

    def end(self, timeout: float) -> tuple[int, str]:
        """Its exit code, which must come by itself within so many seconds, and what it said."""
        return self.process.wait(timeout), self.log.read_text()


@contextlib.contextmanager
def ranks(arguments: Sequence[str], logs: Path, count: int = 2) -> Iterator[list[Rank]]:
    """`python ARGUMENTS` once per rank, with the launcher's variables alone: what ends here ends by itself. None is left behind."""
    logs.mkdir(exist_ok=True)
    port = str(free_port())
    started = []
    try:
        for rank in range(count):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            environment = _environment() | variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = logs / f"rank{rank}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
                )
            started.append(Rank(process, log))
        yield started
    finally:
        for one in started:
            one.process.kill()
            one.process.wait()


def deepspeed(program: str, *arguments: str, ranks: int = 1, **options: Any) -> Finished:
    """`deepspeed --num_accelerators N PROGRAM ARGUMENTS`, as users type it."""
    return run(deepspeed_command(program, *arguments, ranks=ranks), **options)


def deepspeed_command(program: str, *arguments: str, ranks: int = 1) -> list[str]:
    """The words of `deepspeed --num_accelerators N PROGRAM ARGUMENTS`, on a port of its own."""
    return [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port()), program, *arguments]


def python(program: str, *arguments: str, **options: Any) -> Finished:
    """`python PROGRAM ARGUMENTS`."""
    return run([sys.executable, program, *arguments], **options)


def results(folder: Path) -> dict[str, Any]:
    """all_results.json of a run."""
    content: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return content


def logged(folder: Path, name: str = "train/loss") -> list[float]:
    """A metric's values by step, from metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]
