"""Logging: one format, informative lines from rank 0 only, warnings from every rank with its number; each rank's own file.

On standard error the ranks' lines come together in one stream, and it belongs to whoever launched. What a rank said is kept beside
the run as well (`keep_log`), every line of every rank, with its time.
"""

import contextlib
import faulthandler
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import TextIO

from adakron.patience import at_most
from adakron.redaction import printable, redact, redact_arguments, shortened

LOGGER_NAME = "adakron"
KEEP_SECONDS = 2.0
"""How long a rank that ends waits for its last words to be in its file."""

_LONGEST_LINE = 3000


class _RankFilter(logging.Filter):
    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.place = f"rank {self.rank}: " if self.rank else ""
        return self.rank == 0 or record.levelno >= logging.WARNING


class _SafeFormatter(logging.Formatter):
    """A line shows no secret, and no escape sequence that came from a file. Its time, where it has one, is UTC."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    @staticmethod
    def converter(seconds: float | None) -> time.struct_time:
        return time.gmtime(seconds)

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(shortened(printable(redact(line)), _LONGEST_LINE) for line in super().format(record).split("\n"))


class _RankLog(logging.Handler):
    """Keeps the newest records until there is a file for them, and from then on writes them there."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
        self._early: deque[logging.LogRecord] = deque(maxlen=1000)
        self._stream: TextIO | None = None
        self.path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._stream is None:
            self._early.append(record)
            return
        with contextlib.suppress(OSError):  # a full disk must not cost more than lines
            self._stream.write(f"{self.format(record)}\n")
            self._stream.flush()

    def open(self, file: Path, first_line: str) -> TextIO:
        self.path, self._stream = file, file.open("a", encoding="utf-8", errors="replace")
        first = _record(first_line, logging.INFO)
        first.created, first.msecs = min(((one.created, one.msecs) for one in self._early), default=(first.created, first.msecs))
        for record in (first, *self._early):
            self.emit(record)
        self._early.clear()
        return self._stream


_rank_log = _RankLog()


def _record(text: str, level: int) -> logging.LogRecord:
    return logging.LogRecord(LOGGER_NAME, level, __file__, 0, text, None, None)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of this project; quiet until `setup_logging` ran."""
    return logging.getLogger(name if name.startswith(LOGGER_NAME) else f"{LOGGER_NAME}.{name}")


def setup_logging(rank: int, level: int = logging.INFO) -> None:
    """Send this project's log lines to standard error. Called once, by the programs in `launch/`."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SafeFormatter("%(place)s%(message)s"))
    handler.addFilter(_RankFilter(rank))
    logger.addHandler(handler)
    logger.addHandler(_rank_log)
    logger.setLevel(level)
    logger.propagate = False


def keep_log(file: Path) -> None:
    """Append what this rank says to a file, from its first line on. The folder must exist. OSError where it cannot be written.

    Where the interpreter dies (a segmentation fault, an abort), the Python stack goes there, too; and on SIGUSR2 the stacks of all
    threads, which is how one learns where a rank stands still.
    """
    stream = _rank_log.open(file, f"process {os.getpid()} on {socket.gethostname()}: {shlex.join(redact_arguments(sys.argv))}")
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR2, stream, all_threads=True)


def keep(text: str) -> None:
    """A text for this rank's file alone: what went to standard error in another way than by a logger.

    Does not wait for a file system that hangs, and may be called while another thread does.
    """
    at_most(KEEP_SECONDS, lambda: _rank_log.handle(_record(text, logging.ERROR)))


def kept_in() -> Path | None:
    """The file that this rank's log is kept in; None before `keep_log`."""
    return _rank_log.path
