"""Which processes above a rank are its launcher, and what happens when one of them is killed. Shell scripts play the launchers."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from adakron import ancestors
from adakron.ancestors import launchers
from tests.helpers.launch import ROOT

RANK = """
import pathlib, sys, time
from adakron.signals import SignalListener
listener = SignalListener()
listener.listen()
pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(60)
"""


SESSIONS = ("-bash", "zsh")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Callable[..., list[psutil.Process]]]:
    """Starts nested commands, the outermost first, around a rank that listens: its process, then its parents."""
    outermost: list[subprocess.Popen[bytes]] = []

    def start(*names: str) -> list[psutil.Process]:
        rank, ready = tmp_path / "rank.py", tmp_path / "ready"
        rank.write_text(RANK)
        inner = f"{sys.executable} {rank} {ready}"
        for number, (name, *words) in enumerate(name.split() for name in reversed(names)):
            script = tmp_path / str(number) / name
            script.parent.mkdir()
            script.write_text(f"{inner} &\nwait $!\n")
            if name in SESSIONS:  # reads what would be typed
                inner = f"(exec -a {name} bash {' '.join(words)} < {script})"
            else:
                inner = f"(exec -a {'sshd:' if name == 'sshd' else 'bash'} bash {script} {' '.join(words)})"
        outermost.append(
            subprocess.Popen(
                ["bash", "-c", f"{inner}\nexit"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
            )
        )
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        everyone = psutil.Process(outermost[0].pid).children(recursive=True)
        found = next(child for child in everyone if child.cmdline()[1:2] == [str(rank)])
        return [found, *found.parents()]

    yield start
    for shell in outermost:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def named(process: psutil.Process) -> list[str]:
    return [Path(word).name for one in launchers(process.pid) for word in one.words[1:2]]


@pytest.mark.parametrize(
    ("commands", "launching"),
    [
        (["nohup.sh"], []),
        (["nohup.sh", "torchrun"], ["torchrun"]),
        (["nohup.sh", "deepspeed", "python -m deepspeed.launcher.launch"], ["python", "deepspeed"]),
        (["sshd", "ds", "python -m deepspeed.launcher.launch"], ["python", "ds"]),
        # Below an ssh session that the user opened, the command is what counts; else the session stands for it.
        (["sshd", "deepspeed", "python -m deepspeed.launcher.launch"], ["python", "deepspeed"]),
        (["sshd", "shell", "python -m deepspeed.launcher.launch"], ["python", "shell", "sshd"]),
        (["shell", "python -m deepspeed.launcher.launch"], ["python"]),
        # Started by hand in a session of the user's, who may leave it.
        (["sshd", "-bash", "python -m deepspeed.launcher.launch"], ["python"]),
        (["sshd", "zsh --norc", "shell", "python -m deepspeed.launcher.launch"], ["python"]),
    ],
)
def test_launchers_end_at_the_command_that_the_user_gave(tree, commands, launching):
    assert named(tree(*commands)[0]) == launching


@pytest.mark.parametrize("killed", [1, 2])
def test_a_rank_ends_with_any_of_its_launchers(tree, killed):
    family = tree("nohup.sh", "deepspeed", "python -m deepspeed.launcher.launch")
    family[killed].kill()
    assert_gone(family[0])


def test_a_rank_outlives_what_its_launcher_was_started_by(tree):
    rank, *above = tree("nohup.sh", "torchrun")
    above[1].kill()
    time.sleep(2.5)
    assert rank.is_running()
    above[0].kill()
    assert_gone(rank)


def assert_gone(rank: psutil.Process) -> None:
    deadline = time.monotonic() + 10
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_cannot_be_looked_at_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = ancestors._read(os.getppid())
    assert parent is not None
    assert parent.is_there()

    def full(self: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", full)
    assert parent.is_there()
    monkeypatch.setattr(ancestors, "_read", lambda _: None)
    assert not parent.is_there()


@pytest.mark.parametrize(
    ("words", "interactive"),
    [
        (["-bash"], True),
        (["/usr/bin/zsh", "-i"], True),
        (["bash", "--init-file", "/opt/editor/init.sh"], True),
        (["sh", "--login"], True),
        (["bash", "-c", "python -m deepspeed.launcher.launch"], False),  # pdsh's, by way of sshd
        (["-bash", "-c", "python -m deepspeed.launcher.launch"], False),  # su - user -c
        (["zsh", "-lc", "true"], False),
        (["bash", "run.sh"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_a_shell_with_a_command_or_a_script_is_nobodys_session(words, interactive):
    assert ancestors.Ancestor(1, 0, 0, tuple(words)).is_interactive_shell() is interactive
