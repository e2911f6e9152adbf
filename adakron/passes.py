"""The forward and backward passes of one global step on this rank: what is computed before the optimizer moves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adakron.data.sampler import GlobalBatch
from adakron.engine.engine import TrainingEngine
from adakron.objectives import consistency_sum
from adakron.tasks.base import Batch, EncodedSplit, Task, to_device


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
        self._consistency_weight = consistency_weight
        self._before_pass = before_pass

    def gradient(self, batch: GlobalBatch) -> StepLosses:
        """Forward and backward of this rank's micro-batches; the engine then holds the step's gradient. All ranks together."""
        targets = int(self._train.target_counts[batch.examples].sum())
        loss = torch.zeros((), dtype=torch.float32, device=self._engine.device)
        disagreement = torch.zeros_like(loss)
        for micro_step, indices in enumerate(batch.micro_batches):
            loss_sum, disagreement_sum = self._losses(indices, batch.examples[:1], micro_step)
            self._engine.backward(loss_sum + self._consistency_weight * disagreement_sum, targets)
            loss += loss_sum.detach()
            disagreement += disagreement_sum.detach()
        return StepLosses(loss, disagreement, targets)

    def local_gradient(self, batch: GlobalBatch, pieces: Sequence[tuple[int, np.ndarray]]) -> dict[str, Tensor]:
        """This rank's part of a step's gradient, by parameter name; nothing of the run's state changes. All ranks together.

        pieces: what is passed forward at once, (micro_step, examples), as many on every rank; a place without examples is a filler.
        """
        targets = int(self._train.target_counts[batch.examples].sum())
        total: dict[str, Tensor] = {}
        for micro_step, indices in pieces:
            with self._engine.off_the_record():
                loss_sum, disagreement_sum = self._losses(indices, batch.examples[:1], micro_step)
                gradient = self._engine.gradient_of(loss_sum + self._consistency_weight * disagreement_sum, targets)
            total = {name: total[name] + part if total else part for name, part in gradient.items()}
        return total

    def _losses(self, indices: np.ndarray, stand_in: np.ndarray, micro_step: int) -> tuple[Tensor, Tensor]:
        """Sums over a micro-batch: the task's loss, and the disagreement with a second pass where a consistency loss asks for one.

        stand_in: examples to pass forward in place of none.
        """
        filler = len(indices) == 0
        examples = stand_in if filler else indices
        batch = to_device(self._task.collate(self._train, examples, self._pad_token_id), self._engine.device)
        loss_sum, outputs = self._pass(batch, ForwardPass(self._engine.global_step, micro_step, 0, examples, filler))
        disagreement_sum = torch.zeros_like(loss_sum)
        if self._consistency_weight:
            _, again = self._pass(batch, ForwardPass(self._engine.global_step, micro_step, 1, examples, filler))
            disagreement_sum = consistency_sum(outputs, again, self._task.output_kind)
        if filler:
            # This rank has no examples left, but its peers wait for its gradients.
            return loss_sum * 0.0, disagreement_sum * 0.0
        return loss_sum, disagreement_sum

    def _pass(self, batch: Batch, place: ForwardPass) -> tuple[Tensor, Tensor]:
        if self._before_pass is not None:
            self._before_pass(place)
        return self._task.loss(self._engine, batch)
