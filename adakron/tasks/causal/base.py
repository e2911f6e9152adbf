"""What all causal-language-model tasks share: batches whose targets are named one by one, the loss at them, perplexity.

An example is a sequence whose first tokens are context and whose others are targets; `labels` of an encoded split holds where the
targets begin. A target is predicted from the token before it.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from adakron.config import DataConfig, TrainingConfig
from adakron.errors import ConfigError
from adakron.objectives import OutputKind, cross_entropy_sum, token_losses
from adakron.tasks.base import Batch, EncodedSplit, Forward
from adakron.tasks.causal.packing import pack_batch
from adakron.tasks.splits import find_split, pad_examples

_LARGEST_EXPONENT = 700.0  # e^709 is the largest double


class CausalTask:
    """A task of a causal language model. Subclasses read data and make sequences of it.

    The loss is the cross-entropy at the targets with torch's label smoothing. The forward pass must accept `target_positions` (and
    `segments` with --pack) as `adakron.causal.accept_targets` makes a model do.
    """

    auto_class = "AutoModelForCausalLM"
    metric_for_best = "perplexity"
    metric_names: tuple[str, ...] = ("perplexity",)
    output_kind: OutputKind = "logits"

    def __init__(self, data: DataConfig, training: TrainingConfig):
        if training.do_predict:
            raise ConfigError(f"do_predict: {cannot_predict(data.task_name)}; drop --do_predict")
        self.name = data.task_name
        self._data = data
        self._label_smoothing = training.label_smoothing

    @abstractmethod
    def splits(self) -> Mapping[str, datasets.Dataset]:
        """The checked splits that exist, by name."""

    @abstractmethod
    def texts(self, split: str) -> Iterator[str]:
        """The split's texts, each as it is tokenised."""

    def model_options(self) -> dict[str, Any]:
        """None: the vocabulary is the backbone's."""
        return {}

    def split(self, name: str) -> datasets.Dataset:
        """A split that must exist; DataError else."""
        return find_split(self.name, self.splits(), name)

    def collate(self, encoded: EncodedSplit, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
        """The model's input, and the N targets of the batch, example by example.

        input_ids (B, T); attention_mask (B, T), or with --pack position_ids and segments (R, T) in rows that hold several examples.
        target_positions (N,): where in the flattened input each target is predicted. targets (N,): its token. target_rows (N,): its
        example, from 0 to B - 1.
        """
        assert encoded.labels is not None
        rows = np.asarray(indices, dtype=np.int64)
        lengths = encoded.lengths[rows]
        if self._data.pack:
            batch, starts = pack_batch(
                encoded,
                rows,
                pad_token_id=pad_token_id,
                pad_to_multiple_of=self._data.pad_to_multiple_of,
                max_length=encoded.max_length,
            )
        else:
            batch = pad_examples(encoded, rows, pad_token_id, self._data)
            starts = np.arange(len(rows)) * batch["input_ids"].shape[1]
        first = encoded.labels[rows]
        counts = lengths - first
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = np.repeat(starts + first - 1, counts) + inside
        tokens = encoded.features["input_ids"][np.repeat(encoded.offsets[rows] + first, counts) + inside]
        batch["target_positions"] = torch.from_numpy(positions)
        batch["targets"] = torch.from_numpy(tokens.astype(np.int64))
        batch["target_rows"] = torch.from_numpy(np.repeat(np.arange(len(rows)), counts))
        return batch

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropy over the targets, in nats; their logits (N, V))."""
        logits = self._logits(forward, batch)
        return cross_entropy_sum(logits, batch["targets"], self._label_smoothing), logits

    def predict(self, forward: Forward, batch: Batch) -> Tensor:
        """(B, 2) fp32: the sum of each example's cross-entropy in nats, without smoothing, and its number of targets."""
        losses = token_losses(self._logits(forward, batch), batch["targets"])
        rows = batch["target_rows"]
        # Every example has a target, so the last row is known; the host waits for it, in evaluation only.
        sums = torch.zeros(int(rows[-1]) + 1, 2, device=losses.device)
        return sums.index_add_(0, rows, torch.stack([losses, torch.ones_like(losses)], dim=1))

    def _logits(self, forward: Forward, batch: Batch) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("targets", "target_rows")}
        logits: Tensor = forward(**inputs, use_cache=False).logits
        return logits.squeeze(0)

    def score(self, split: str, outputs: np.ndarray) -> dict[str, float]:
        """loss: mean over the targets, in nats. perplexity: e^loss."""
        total, targets = outputs.astype(np.float64).sum(axis=0)
        return {"loss": float(total / targets), "perplexity": exponential(total / targets)}

    def prediction_files(self, split: str) -> tuple[str, ...]:
        """None."""
        return ()

    def write_predictions(self, split: str, outputs: np.ndarray, folder: Path) -> None:
        """ConfigError: what these tasks predict is text, which a decoder writes."""
        raise ConfigError(cannot_predict(self.name))


def exponential(value: float) -> float:
    """e^value, bounded: a model that diverged must not end the run with an overflow, nor write infinity into JSON."""
    return math.exp(min(float(value), _LARGEST_EXPONENT))


def cannot_predict(name: str) -> str:
    """Why launch/predict.py and --do_predict have nothing to write, and what to use instead."""
    if name == "lm":
        return "task lm has no predictions, only scores (launch/evaluate.py RUN)"
    return f"task {name} predicts by generating, which launch/generate.py does with a saved run"
