"""The forward and backward passes of one global step on this rank: what is computed before the optimizer moves."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from adakron.data.sampler import GlobalBatch
from adakron.engine.engine import TrainingEngine
from adakron.objectives import consistency_sum
from adakron.stragglers import ComputeClock
from adakron.tasks.base import Batch, EncodedSplit, Forward, Task, to_device


@dataclass(frozen=True)
class ForwardPass:
    """Where a forward pass of training stands, each number from 0.

    step: optimizer steps done. micro_step: micro-batch of the step on this rank. index: pass of the micro-batch.
    examples: (B,) the rows' places in the training split. filler: the rows only keep this rank in step with its peers.
    """

    step: int
    micro_step: int
    index: int
    examples: np.ndarray
    filler: bool = False


BeforePass = Callable[[ForwardPass], None]
"""Told before every forward pass of training, for what depends on it: a mixture's experts, dropout's masks."""


@dataclass(frozen=True)
class StepLosses:
    """Sums over this rank's share of a global step, fp32 scalars on the device; targets: valid ones of all ranks."""

    loss: Tensor
    disagreement: Tensor
    targets: int


class MicroBatchLoss:
    """The losses of a micro-batch: the task's, and the disagreement with a second pass where a consistency loss asks for one.

    forward: the model. before_pass: told where each forward pass stands.
    """

    def __init__(self, forward: Forward, task: Task, consistency_weight: float = 0.0, before_pass: BeforePass | None = None):
        self._forward = forward
        self._task = task
        self._before_pass = before_pass
        self.consistency_weight = consistency_weight

    def sums(self, batch: Batch, place: ForwardPass) -> tuple[Tensor, Tensor]:
        """Sums over the micro-batch of the task's loss and of the disagreement, with their gradients."""
        loss_sum, outputs = self._pass(batch, place)
        if not self.consistency_weight:
            return loss_sum, torch.zeros_like(loss_sum)
        _, again = self._pass(batch, dataclasses.replace(place, index=1))
        return loss_sum, consistency_sum(outputs, again, self._task.output_kind)

    def _pass(self, batch: Batch, place: ForwardPass) -> tuple[Tensor, Tensor]:
        if self._before_pass is not None:
            self._before_pass(place)
        return self._task.loss(self._forward, batch)


class StepPasses:
    """Computes the gradient of a global step: every micro-batch's loss, and the consistency loss where one is asked for."""

    def __init__(
        self,
        engine: TrainingEngine,
        task: Task,
        train: EncodedSplit,
        *,
        pad_token_id: int,
        consistency_weight: float = 0.0,
        before_pass: BeforePass | None = None,
    ):
        self._engine = engine
        self._task = task
        self._train = train
        self._pad_token_id = pad_token_id
        self._losses = partial(MicroBatchLoss, task=task, consistency_weight=consistency_weight, before_pass=before_pass)
        self._loss = self._losses(engine)
        self.clock = ComputeClock(engine.device)
        """What this rank computes in micro-batches."""

    def gradient(self, batch: GlobalBatch) -> StepLosses:
        """Forward and backward of this rank's micro-batches; the engine then holds the step's gradient. All ranks together."""
        targets = self.targets(batch)
        loss = torch.zeros((), dtype=torch.float32, device=self._engine.device)
        disagreement = torch.zeros_like(loss)
        for place in self.places(batch):
            loss_sum, disagreement_sum = self.micro_batch(place, targets, self.clock)
            loss += loss_sum
            disagreement += disagreement_sum
        self.clock.count_step()
        return StepLosses(loss, disagreement, targets)

    def local_gradient(self, places: Sequence[ForwardPass], targets: int) -> dict[str, Tensor]:
        """This rank's part of a step's gradient, by parameter name; nothing of the run's state changes. All ranks together.

        places: as many on every rank. targets: of the whole step.
        """
        total: dict[str, Tensor] = {}
        for place in places:
            with self._engine.without_accumulating() as model:
                loss_sum, disagreement_sum = self._sums(place, self._losses(model))
                part = self._engine.gradient_of(loss_sum + self._loss.consistency_weight * disagreement_sum, targets)
            total = {name: total[name] + tensor if total else tensor for name, tensor in part.items()}
        return total

    def rehearse(self, examples: np.ndarray) -> None:
        """Forward and backward of one micro-batch, for the memory it takes: on this rank alone, whatever happens on others, and
        nothing of the run's state changes.
        """
        with self._engine.rehearsing() as model:
            loss_sum, disagreement_sum = self._sums(ForwardPass(self._engine.global_step, 0, 0, examples), self._losses(model))
            self._engine.gradient_of(loss_sum + self._loss.consistency_weight * disagreement_sum, len(examples))

    def targets(self, batch: GlobalBatch) -> int:
        """Valid targets of a global step, on all ranks."""
        return int(self._train.target_counts[batch.examples].sum())

    def places(self, batch: GlobalBatch) -> list[ForwardPass]:
        """The first forward pass of each of this rank's micro-batches."""
        step = self._engine.global_step
        return [
            ForwardPass(step, micro_step, 0, indices if len(indices) else batch.examples[:1], filler=not len(indices))
            for micro_step, indices in enumerate(batch.micro_batches)
        ]

    def collate(self, place: ForwardPass) -> Batch:
        """The tensors of a micro-batch, on the host."""
        return self._task.collate(self._train, place.examples, self._pad_token_id)

    def micro_batch(self, place: ForwardPass, targets: int, clock: ComputeClock | None = None) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch; its sums of loss and disagreement. targets: of the whole step."""
        if clock is not None:
            clock.start()
        loss_sum, disagreement_sum = self._sums(place, self._loss)
        total = loss_sum + self._loss.consistency_weight * disagreement_sum
        if clock is not None:
            clock.stop_behind(total)
        self._engine.backward(total, targets)
        return loss_sum.detach(), disagreement_sum.detach()

    def _sums(self, place: ForwardPass, loss: MicroBatchLoss) -> tuple[Tensor, Tensor]:
        loss_sum, disagreement_sum = loss.sums(to_device(self.collate(place), self._engine.device), place)
        if place.filler:
            # This rank has no examples left, but its peers wait for its gradients.
            return loss_sum * 0.0, disagreement_sum * 0.0
        return loss_sum, disagreement_sum
