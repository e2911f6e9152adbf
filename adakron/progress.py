"""A progress bar on a terminal, plain log lines elsewhere; nothing on ranks other than 0."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from adakron import distributed
from adakron.log import get_logger

logger = get_logger(__name__)


def _wanted(disable: bool | None) -> bool:
    return distributed.rank() == 0 and (not disable if disable is not None else sys.stderr.isatty())


class TrainingProgress:
    """Shows how far training is: total in optimizer steps; disable None decides by whether standard error is a terminal."""

    def __init__(self, total: int, disable: bool | None):
        self._total = total
        self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, desc="training") if _wanted(disable) else None

    def advance(self, steps: int = 1) -> None:
        """So many more optimizer steps are done."""
        if self._bar is not None:
            self._bar.update(steps)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show values beside the bar, or as a line."""
        text = "  ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            logger.info("step %d/%d  %s", step, self._total, text)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            logger.info("%s", text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress_over(items: Sequence[Any], name: str, disable: bool | None) -> Iterator[Iterator[Any]]:
    """Iterate with a bar that disappears when done."""
    if _wanted(disable):
        with tqdm(items, desc=name, unit="batch", leave=False, dynamic_ncols=True) as bar:
            yield iter(bar)
    else:
        yield iter(items)


class GenerationProgress:
    """Shows how many of this rank's prompts are done, and how fast: a bar on a terminal, else a line now and then.

    total: prompts. disable: see `TrainingProgress`. Tokens are those of the texts, not those of every beam.
    """

    def __init__(self, total: int, disable: bool | None, line_seconds: float = 30.0):
        self.tokens = 0
        self._prompts, self._total = 0, total
        self._started = self._said = time.monotonic()
        self._line_seconds = line_seconds
        self._bar = tqdm(total=total, unit="prompt", dynamic_ncols=True, desc="generating") if _wanted(disable) else None

    def advance(self, prompts: int, tokens: int) -> None:
        """So many more prompts are done, and so many more tokens generated."""
        self._prompts += prompts
        self.tokens += tokens
        now = time.monotonic()
        speed = f"{self.tokens / max(now - self._started, 1e-9):,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(prompts)
        elif now - self._said >= self._line_seconds:
            self._said = now
            logger.info("generating: %d of %d prompts of this rank, %s", self._prompts, self._total, speed)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
