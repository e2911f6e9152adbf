"""What a task is to the trainer and the evaluator: raw splits, encoding, a loss sum with its target count, a score.

The trainer knows no task and a task knows no loop. Everything a task does before `loss` happens on the host, before any
process group exists, and is the same on every rank.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adakron.objectives import OutputKind

Batch = dict[str, Tensor]
Forward = Callable[..., Any]  # the wrapped model: keyword tensors in, a transformers ModelOutput out


@dataclass(frozen=True)
class EncodedSplit:
    """A tokenised split, stored flat: example i is `features[name][offsets[i]:offsets[i + 1]]`.

    features: token-level columns ("input_ids", "token_type_ids"), each a 1-D integer array over all tokens of the split.
    offsets: (examples + 1,) int64.
    labels: (examples, ...) array, or None for an unlabelled split.
    target_counts: (examples,) int64, how many valid targets each example adds to the loss (1 for classification).
    truncated: how many examples were longer than the maximum length.
    max_length: the longest input, in tokens, that settings and tokenizer allow; padding stays within it.
    """

    features: Mapping[str, np.ndarray]
    offsets: np.ndarray
    labels: np.ndarray | None
    target_counts: np.ndarray
    truncated: int
    max_length: int | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def digest(self) -> str:
        """SHA-256 of everything that training sees of the split, in its order."""
        content = hashlib.sha256()
        arrays = {**self.features, "offsets": self.offsets, "target_counts": self.target_counts}
        if self.labels is not None:
            arrays["labels"] = self.labels
        for name, array in sorted(arrays.items()):
            content.update(f"{name} {array.dtype} {array.shape}".encode())
            content.update(np.ascontiguousarray(array).tobytes())
        return content.hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """(examples,) int64, in tokens, without padding."""
        return np.diff(self.offsets)


class Task(Protocol):
    """One problem: its data, its loss, its score. `tasks/ner.py` is the worked example."""

    name: str

    @property
    def metric_for_best(self) -> str:
        """Name, as `score` returns it, of the metric that decides what is best. May read the data."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names that `score` returns, besides "loss". May read the data."""

    auto_class: str
    """Name of the transformers Auto class that gives backbone and head, e.g. AutoModelForSequenceClassification."""

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments for the model's configuration: num_labels, id2label, label2id, problem_type."""

    def splits(self) -> Mapping[str, datasets.Dataset]:
        """Raw, validated splits by name: "train", "validation" (and further "validation_*"), "test"; what exists."""

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        """Tokenise a split, from the cache where it was tokenised before."""

    def collate(self, encoded: EncodedSplit, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
        """Padded tensors on the host: input_ids (B, T), attention_mask (B, T), ..., labels (B,) where there are any."""

    @property
    def output_kind(self) -> OutputKind:
        """What `loss` returns as outputs. May read the data."""

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the loss over the batch's valid targets, in fp32; the outputs at these targets, (targets, ...), with their
        gradient). Sums, never means.
        """

    def predict(self, forward: Forward, batch: Batch) -> Tensor:
        """What `score` and `write_predictions` need, in fp32, first dimension B, padded to equal width where ragged."""

    def score(self, split: str, outputs: np.ndarray) -> dict[str, float]:
        """The task's metrics from the outputs of a whole labelled split, in the split's order; includes "loss"."""

    def prediction_files(self, split: str) -> tuple[str, ...]:
        """Names of the files that `write_predictions` makes of a split."""

    def write_predictions(self, split: str, outputs: np.ndarray, folder: Path) -> None:
        """Write what is predicted for the examples of the split, in its order, into files of the folder."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; asynchronous from pinned memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
