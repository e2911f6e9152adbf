"""One hostile case after another, each from its seed: a program must refuse it in one paragraph or accept it, and leave nothing behind.

A case that fails is run again with `ADAKRON_FUZZ_SEED=<seed> pytest "<its test id>"`; ADAKRON_FUZZ_CASES multiplies the numbers.
"""

import contextlib
import io
import os
import re
import resource
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
import pytest

from adakron import distributed
from launch.program import run_program

T = TypeVar("T")

SEED = int(os.environ.get("ADAKRON_FUZZ_SEED", "0"))
TIMES = float(os.environ.get("ADAKRON_FUZZ_CASES", "1"))

SECONDS = 8.0
"""Longest processor time of a case. The usual one takes 5 to 200 ms."""

MEMORY = 3 * 2**30
"""Address space in bytes that a case may take on top: a bomb then ends in MemoryError, and not with the machine."""

LONGEST = 12_000
"""Characters that a program may print about one case."""


CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""What moves a cursor, colours a terminal, or turns a line around; line ends are allowed."""


class Accepted(BaseException):
    """Raised where a program would form its process group: everything given to it was accepted."""


@dataclass
class Case:
    """A program's command line, and what must be said of it.

    named: a refusal says one of these. what: for whoever reads the failure. written: files and folders that acceptance may leave.
    """

    program: ModuleType
    arguments: list[str]
    named: Sequence[str]
    what: str = ""
    written: Sequence[Path] = field(default=())


def cases(count: int) -> pytest.MarkDecorator:
    """Parametrise a test with `index`, `count` times (ADAKRON_FUZZ_CASES changes the number)."""
    return pytest.mark.parametrize("index", range(max(1, round(count * TIMES))))


def generator(area: str, index: int) -> np.random.Generator:
    """The random numbers of one case: they depend on the seed, the area and the index alone."""
    return np.random.default_rng([SEED, zlib.crc32(area.encode()), index])


@dataclass(frozen=True)
class Outcome:
    """accepted: whether the program took the input. message: what it printed."""

    accepted: bool
    message: str


def run_case(case: Case, home: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Run a case in this process, in the folder `home` that holds its input, and check everything that every case must keep."""
    told = f"\nseed {SEED}: {case.what}\n{case.program.__name__} {' '.join(map(ascii, case.arguments))[:3000]}"
    monkeypatch.setattr(sys, "argv", [case.program.__name__, *case.arguments])
    monkeypatch.setattr(distributed, "form_group", _accept)
    monkeypatch.chdir(home)
    before = tree(home)
    printed = io.StringIO()
    # Of this process, for a busy machine is none of a case's fault; one that waits is ended by the test's own timeout.
    started = time.process_time()
    try:
        with _bounded_memory(), contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            code = run_program(case.program.main)
    except Accepted:
        code = 0
    except SystemExit as error:  # --help, --version
        code = int(error.code or 0)
    except Exception as error:
        error.add_note(told)
        raise
    seconds = time.process_time() - started
    message = "\n".join(line for line in printed.getvalue().splitlines() if line.startswith(("error:", "  - ")))
    left = {path for path in tree(home).items() - before.items() if code != 0 or not path[0].startswith(tuple(map(str, case.written)))}
    assert not left, f"it left or changed {sorted(path for path, _ in left)}{told}"
    assert seconds < SECONDS, f"it took {seconds:.1f} s{told}"
    assert code in (0, 2), f"exit code {code}{told}"
    print(f"{seconds:.2f} s: {message or 'accepted'}{told}")
    if code == 2:
        check_message(printed.getvalue(), message, case.named, told)
    return Outcome(code == 0, message)


def check_message(printed: str, message: str, named: Sequence[str], told: str = "") -> None:
    """One paragraph that names what is wrong, and nothing that a terminal would obey."""
    assert message.startswith("error: "), f"no error line in {printed!r}{told}"
    assert len(printed) < LONGEST, f"{len(printed)} characters: {printed[:2000]!r}{told}"
    assert "Traceback" not in printed, f"{printed}{told}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", printed), (
        f"control characters: {printed!r}{told}"
    )
    assert any(name in message for name in named), f"names none of {list(named)}: {message}{told}"
    assert not re.search(r"<[\w. ]+ at 0x|Errno \d", message), f"for programmers: {message}{told}"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and time of change."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def _accept(*arguments: object, **options: object) -> None:
    raise Accepted


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of the values."""
    return values[int(rng.integers(len(values)))]
