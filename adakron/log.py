"""Logging: one format, informative lines from rank 0 only, warnings from every rank with its number."""

import logging
import sys

from adakron.redaction import printable, redact, shortened

LOGGER_NAME = "adakron"
_LONGEST_LINE = 3000


class _RankFilter(logging.Filter):
    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.place = f"rank {self.rank}: " if self.rank else ""
        return self.rank == 0 or record.levelno >= logging.WARNING


class _SafeFormatter(logging.Formatter):
    """A line shows no secret, and no escape sequence that came from a file."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(shortened(printable(redact(line)), _LONGEST_LINE) for line in super().format(record).split("\n"))


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
    logger.setLevel(level)
    logger.propagate = False
