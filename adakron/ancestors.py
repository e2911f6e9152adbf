"""The processes that started this rank, and whether they are still there.

A launcher that is killed takes nobody with it: its ranks would train on with no one to end them, and nobody to say how they ended.
Read from /proc, so Linux only; elsewhere a launcher's end is not noticed. Standard library only, as `adakron.signals`.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOOK_SECONDS = 1.0
"""Between two looks at the launcher."""

_COMMANDS = {"deepspeed", "deepspeed.pt", "ds", "torchrun"}
_MODULES = {"deepspeed.launcher.runner", "torch.distributed.run"}
_PER_HOST = "deepspeed.launcher.launch"
_SHELLS = {"sh", "ash", "bash", "csh", "dash", "fish", "ksh", "mksh", "tcsh", "zsh"}
_START_FILES = {"--init-file", "--rcfile"}  # options whose value is a word of its own


@dataclass(frozen=True)
class Ancestor:
    """A process above this one.

    started: in clock ticks since the machine started, which tells it from a later one of the same number. terminal: the number of its
    terminal; 0 where it has none.
    """

    pid: int
    parent: int
    started: int
    words: tuple[str, ...]
    terminal: int = 0

    def is_interactive_shell(self) -> bool:
        """Whether it is a shell that somebody types into (or pipes), given neither a command (-c) nor a script."""
        if not self.words or Path(self.words[0]).name.removeprefix("-") not in _SHELLS:
            return False
        rest = iter(self.words[1:])
        for word in rest:
            if word in _START_FILES:
                next(rest, None)
            elif not word.startswith("-") or (not word.startswith("--") and "c" in word):
                return False
        return True

    def is_there(self) -> bool:
        """Whether it still runs, or nobody can tell."""
        try:
            now = _read(self.pid)
        except OSError:  # too many open files, no memory: nothing that the process did
            return True
        return now is not None and now.started == self.started


def launchers(pid: int | None = None) -> list[Ancestor]:
    """The processes from this one's (or another's) parent up to the command that launched it; none where no launcher did.

    What is above that command (a terminal, nohup, an ssh session that a user left) may end without harm. Not so where DeepSpeed's
    process of one host has no such command above it: the command runs on another host, and the ssh session stands for it, unless
    it is a user's, who started that process from a shell of theirs.
    """
    above: list[Ancestor] = []
    with contextlib.suppress(OSError):
        process = _read(os.getpid() if pid is None else pid)
        while process is not None and process.parent > 0 and (process := _read(process.parent)) is not None:
            above.append(process)
    commands = [place for place, one in enumerate(above) if _is_command(one)]
    if commands:
        return above[: commands[-1] + 1]
    per_host = [place for place, one in enumerate(above) if _PER_HOST in one.words[:4]]
    if not per_host:
        return []
    session = [place for place, one in enumerate(above) if place > per_host[-1] and one.words[:1] and one.words[0].startswith("sshd")]
    if session and any(one.is_interactive_shell() for one in above[per_host[-1] : session[0]]):
        session = []
    return above[: (session or per_host)[0] + 1]


def process(pid: int) -> Ancestor | None:
    """The live process of that number; None where there is none, or nobody can tell."""
    with contextlib.suppress(OSError):
        return _read(pid)
    return None


def watch_launchers(gone: Callable[[], None]) -> None:
    """Look at the launchers of this process from now on, in a thread; call `gone`, once, when one of them has ended."""
    found = launchers()

    def look() -> None:
        while all(one.is_there() for one in found):
            time.sleep(LOOK_SECONDS)
        gone()

    if found:
        threading.Thread(target=look, name="launcher", daemon=True).start()


def _is_command(process: Ancestor) -> bool:
    # An interpreter and its options come before the script or module.
    words = [Path(word).name for word in process.words[:4]]
    return bool(_COMMANDS.intersection(words[:2]) or ("-m" in words and _MODULES.intersection(process.words[:4])))


def _read(pid: int) -> Ancestor | None:
    """A live process; None where it is gone, only its exit code being left, or where there is no /proc. OSError where nobody can tell."""
    try:
        # The name in parentheses may hold anything. Behind it: state, parent, group, session, terminal, ..., 19 after the state the start.
        state, parent, *others = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    if state in "ZX":
        return None
    return Ancestor(pid, int(parent), int(others[17]), tuple(word.decode(errors="replace") for word in words if word), int(others[2]))
