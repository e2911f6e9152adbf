"""Outputs of a model for a whole split: every rank takes its share of the same batches, the parts are put back in order."""

from collections.abc import Callable

import numpy as np
import torch

from adakron import distributed
from adakron.config import TrainingConfig
from adakron.data.sampler import evaluation_batches
from adakron.errors import NumericalError
from adakron.progress import progress_over
from adakron.tasks.base import EncodedSplit, Forward, Task, to_device

LOWER_IS_BETTER = ("loss", "mse", "mae", "perplexity", "word_perplexity", "bits_per_byte")


class Evaluator:
    """Predicts and scores splits. batch_size: examples per forward pass and rank.

    before_batch: told the number of every batch, counted over all ranks, for what depends on it: random experts.
    boundary: passed before every batch by all ranks alike; what it raises ends the evaluation.

    The batches, and so their padding, do not depend on the number of ranks; every rank runs equally many forward passes,
    which ZeRO-3 needs. All ranks return the same.
    """

    def __init__(
        self,
        task: Task,
        *,
        batch_size: int,
        pad_token_id: int,
        device: torch.device,
        world_size: int = 1,
        rank: int = 0,
        disable_progress: bool | None = None,
        before_batch: Callable[[int], None] | None = None,
        boundary: Callable[[], None] = lambda: None,
    ):
        self._task = task
        self._batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._device = device
        self._world_size = world_size
        self._rank = rank
        self._disable_progress = disable_progress
        self._before_batch = before_batch
        self._boundary = boundary

    @torch.no_grad()
    def outputs(self, forward: Forward, encoded: EncodedSplit, name: str = "predicting") -> np.ndarray:
        """The task's outputs for every example, (examples, ...), in the split's order. The model must be in evaluation mode.

        Raises NumericalError where an output is not finite.
        """
        mine: list[tuple[np.ndarray, np.ndarray]] = []
        batches = evaluation_batches(encoded.lengths, self._batch_size, self._world_size, self._rank)
        with progress_over(batches, name, self._disable_progress) as shown:
            for round_number, indices in enumerate(shown):
                self._boundary()
                if self._before_batch is not None:
                    self._before_batch(round_number * self._world_size + self._rank)
                filler = len(indices) == 0
                batch = self._task.collate(encoded, [0] if filler else indices, self._pad_token_id)
                outputs = self._task.predict(forward, to_device(batch, self._device))
                if not filler:
                    mine.append((indices, outputs.cpu().numpy()))
        parts = [part for rank_parts in distributed.all_gather_object(mine) for part in rank_parts]
        ordered = _in_order(parts, len(encoded))
        _check_finite(ordered, name)
        return ordered

    def score(self, forward: Forward, split: str, encoded: EncodedSplit) -> dict[str, float]:
        """The task's metrics on a labelled split."""
        outputs = self.outputs(forward, encoded, f"evaluating {split}")
        # Rank 0's numbers for all: ranks decide by them what is best, and a last bit may differ between hosts.
        return distributed.on_rank_0(lambda: self._task.score(split, outputs))


def evaluation_prefix(split: str) -> str:
    """The prefix of a split's metrics: "eval_" for validation, "eval_mismatched_" for validation_mismatched."""
    return "eval_" + (split.removeprefix("validation").removeprefix("_") + "_" if split != "validation" else "")


def _check_finite(outputs: np.ndarray, doing: str) -> None:
    bad = ~np.isfinite(outputs.reshape(len(outputs), -1)).all(axis=1)
    if bad.any():
        raise NumericalError(
            f"{doing}: {int(bad.sum())} of {len(bad)} outputs are not finite, the first for example {int(bad.argmax())}; the training "
            "diverged: lower --learning_rate, or clip with --max_grad_norm 1"
        )


def _in_order(parts: list[tuple[np.ndarray, np.ndarray]], examples: int) -> np.ndarray:
    first = parts[0][1]
    ordered = np.empty((examples, *first.shape[1:]), dtype=first.dtype)
    for indices, outputs in parts:
        ordered[indices] = outputs
    return ordered


def best_metric_name(training: TrainingConfig, task: Task) -> str:
    """The metric that decides what is best, without the prefix eval_."""
    return (training.metric_for_best_model or task.metric_for_best).removeprefix("eval_")


def greater_is_better(training: TrainingConfig, metric: str) -> bool:
    """Whether a larger value of the metric is better."""
    return metric not in LOWER_IS_BETTER if training.greater_is_better is None else training.greater_is_better
