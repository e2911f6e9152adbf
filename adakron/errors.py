"""Every error a user can cause, or can do something about.

Each class inherits twice: from `AdaKronError`, so that a program can catch all of ours, and from the built-in class that
describes it, so that generic handlers keep working. A message says what is wrong, what was got, the rule, and the remedy.
"""

from collections.abc import Sequence


class AdaKronError(Exception):
    """Base of all errors raised on purpose by this project."""


class ConfigError(AdaKronError, ValueError):
    """A setting is wrong, or two settings contradict each other."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(AdaKronError, ValueError):
    """An input file, column, label or split is missing or not what the task needs."""


class CheckpointError(AdaKronError, RuntimeError):
    """A saved folder is missing, damaged, or does not fit the model it is loaded into."""


class NumericalError(AdaKronError, FloatingPointError):
    """A loss or gradient stopped being a finite number."""
