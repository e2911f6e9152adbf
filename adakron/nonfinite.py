"""Steps whose loss or gradient is not finite: found without waiting for the device, looked into on all ranks, raised or skipped.

The engine never applies such a step (`TrainingEngine.step`), so the parameters stay those of the last good one. Only then is the
step computed again, with an eye on every micro-batch and every trained parameter.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from adakron import distributed
from adakron.data.sampler import GlobalBatch
from adakron.dumps import StepDump
from adakron.engine.engine import TrainingEngine
from adakron.errors import CheckpointError, NumericalError
from adakron.log import get_logger
from adakron.passes import StepLosses, StepPasses

logger = get_logger(__name__)

MOST_IN_A_ROW = 5
"""Steps that `--on_nonfinite skip` skips in a row: one bad example costs one step, a diverged run every step."""

MOST_DUMPS = 20
"""Steps that a rank writes down in one run."""


class Evidence(Protocol):
    """Where a step that went wrong is kept, and what a run can go back to."""

    def keep(self, dump: StepDump) -> Path:
        """Write it down. Called on the ranks concerned; the run fills in `dump.run`. May raise OSError."""

    def last_good(self) -> Path | None:
        """The newest checkpoint of the run that holds finite numbers alone."""


@dataclass(frozen=True)
class Finding:
    """What a rank saw when it computed the step again; micro_step None: nothing that is not finite.

    loss: sum of the micro-batch. parameter: the model's first trained parameter whose gradient is not finite.
    """

    rank: int
    micro_step: int | None = None
    examples: tuple[int, ...] = ()
    loss: float = 0.0
    parameter: str | None = None

    def __str__(self) -> str:
        bad_loss = not math.isfinite(self.loss)
        what = f"the loss is {self.loss}" if bad_loss else f"the loss is {self.loss:.4g}, but the gradient of {self.parameter} not finite"
        return f"{what} on rank {self.rank}, micro-batch {self.micro_step}, training examples {_listed(self.examples)}"


class NonFiniteSteps:
    """Decides what follows a step that the engine did not apply. All ranks together, with the same outcome."""

    def __init__(self, engine: TrainingEngine, passes: StepPasses, policy: Literal["raise", "skip"], evidence: Evidence | None):
        self._engine = engine
        self._passes = passes
        self._policy = policy
        self._evidence = evidence
        self._dumps = 0
        self._in_a_row = 0
        self.skipped = 0

    def passed(self) -> None:
        """A step was applied."""
        self._in_a_row = 0

    def examine(self, batch: GlobalBatch, losses: StepLosses) -> StepLosses | None:
        """After a step that was not applied: NumericalError, or None where it is skipped.

        A step that is finite when it is computed again is applied under policy skip; its losses are returned.
        """
        if self._engine.precision == "fp16" and not self._any_rank(not bool(torch.isfinite(losses.loss + losses.disagreement))):
            return None  # fp16's scale was too large for the gradient: DeepSpeed halved it
        text, again = self._investigate(batch)
        if self._policy == "raise":
            raise self._error(text, f"{self._engine.advice}; or go on without such steps: --on_nonfinite skip")
        # The gradient computed again is in the engine, which skips it again and forgets it; or finds it finite, and right.
        try:
            applied = self._engine.step(again=True)
        except NumericalError as error:
            raise self._error(text, str(error)) from error
        if applied:
            _warn("%s; finite when computed again, and applied", text)
            return again
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > MOST_IN_A_ROW:
            reason = f"the {MOST_IN_A_ROW} steps before it were skipped, too: this is no single bad batch; {self._engine.advice}"
            raise self._error(text, reason)
        _warn("skipped: %s", text)
        return None

    def explain(self, batch: GlobalBatch, reason: str) -> NumericalError:
        """The error of a step that the engine gave up at, with all that is known."""
        return self._error(self._investigate(batch)[0], reason)

    def _error(self, text: str, reason: str) -> NumericalError:
        said = [text]
        if self._evidence is not None:
            checkpoint = distributed.on_rank_0(self._last_good)
            said.append(f"the last good checkpoint is {checkpoint}" if checkpoint else "the run has saved no checkpoint yet")
        return NumericalError("; ".join([*said, reason]))

    @staticmethod
    def _any_rank(mine: bool) -> bool:
        return bool(distributed.all_reduce_max(torch.tensor(float(mine))))

    def _investigate(self, batch: GlobalBatch) -> tuple[str, StepLosses]:
        number = self._engine.global_step + 1
        mine, losses = self._compute_again(batch)
        parameters = self._engine.trainable_tensors()
        findings = [finding for finding in distributed.all_gather_object(mine) if finding.micro_step is not None]
        concerned = mine.micro_step is not None or (not findings and distributed.rank() == 0)
        files = distributed.all_gather_object(self._keep(number, batch, parameters, losses.targets) if concerned else None)
        more = [f"and on {len(findings) - 4} more ranks"] if findings[4:] else []
        seen = "; ".join([*map(str, findings[:4]), *more]) or "loss or gradient were not finite, but no micro-batch's are, computed again"
        said = [f"step {number}: {seen}"]
        said += [f"written down in {file} (launch/train.py --replay FILE)" for file in files if file][:4]
        return "; ".join(said), losses

    def _last_good(self) -> Path | None:
        assert self._evidence is not None
        with contextlib.suppress(CheckpointError):  # a folder that cannot be read must not hide what went wrong
            return self._evidence.last_good()
        return None

    def _compute_again(self, batch: GlobalBatch) -> tuple[Finding, StepLosses]:
        """The step's forward and backward passes once more, one micro-batch after the other, each looked at."""
        targets = self._passes.targets(batch)
        seen: dict[str, Tensor] = {}
        hooks = [
            parameter.register_hook(lambda gradient, name=name: seen.__setitem__(name, torch.isfinite(gradient).all()))
            for name, parameter in self._engine.trainable_parameters()
        ]
        found = Finding(distributed.rank())
        losses: list[tuple[Tensor, Tensor]] = []
        try:
            for place in self._passes.places(batch):
                seen.clear()
                losses.append(self._passes.micro_batch(place, targets))
                loss = float(losses[-1][0])
                bad = [name for name, _ in self._engine.trainable_parameters() if not seen.get(name, True)]
                if found.micro_step is None and (bad or not math.isfinite(loss)):
                    examples = tuple(int(example) for example in place.examples)
                    found = Finding(found.rank, place.micro_step, examples, loss, bad[0] if bad else None)
        finally:
            for hook in hooks:
                hook.remove()
        total, disagreement = (torch.stack(values).sum() for values in zip(*losses, strict=True))
        return found, StepLosses(total, disagreement, targets)

    def _keep(self, number: int, batch: GlobalBatch, parameters: Mapping[str, Tensor], targets: int) -> str | None:
        if self._evidence is None or self._dumps >= MOST_DUMPS:
            return None
        self._dumps += 1
        places = self._passes.places(batch)
        batches = [self._passes.collate(place) for place in places]
        dump = StepDump(number, distributed.rank(), distributed.world_size(), targets, places, batches, parameters, run={})
        try:
            return str(self._evidence.keep(dump))
        except OSError as error:
            return f"no file, as it cannot be written: {error}"


def _warn(text: str, *values: object) -> None:
    if distributed.rank() == 0:  # all ranks know the same
        logger.warning(text, *values)


def _listed(examples: tuple[int, ...]) -> str:
    return ", ".join(map(str, examples[:16])) + (f", ... ({len(examples)})" if len(examples) > 16 else "")
