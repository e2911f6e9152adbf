"""Padded batches from flat token arrays, without a Python loop over tokens or examples."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class FlatTokens(Protocol):
    """Token columns stored flat: example i is `features[name][offsets[i]:offsets[i + 1]]`."""

    @property
    def features(self) -> Mapping[str, np.ndarray]:
        """Token-level columns by name, each 1-D over all tokens."""

    @property
    def offsets(self) -> np.ndarray:
        """(examples + 1,) start of each example, and the end of the last."""


def pad_batch(
    encoded: FlatTokens,
    indices: Sequence[int] | np.ndarray,
    *,
    pad_token_id: int,
    pad_to_multiple_of: int = 1,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """Right-padded int64 tensors (B, T) of the examples: every token column and an attention_mask.

    T is the longest example of the batch, in tokens, rounded up to pad_to_multiple_of but never beyond max_length, which no
    example may exceed. input_ids are padded with pad_token_id, other columns with 0. An empty batch gives (0, T) tensors.
    """
    rows = np.asarray(indices, dtype=np.int64)
    starts = encoded.offsets[rows]
    lengths = encoded.offsets[rows + 1] - starts
    longest = max(int(lengths.max(initial=0)), 1)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    if max_length is not None:
        width = max(min(width, max_length), longest)
    columns = np.arange(width)
    mask = columns < lengths[:, None]
    # Row-major selection: the flat positions of a row's tokens follow one another, as the mask's True cells do.
    positions = (starts[:, None] + columns)[mask]
    batch = {}
    for name, tokens in encoded.features.items():
        padded = np.full(mask.shape, pad_token_id if name == "input_ids" else 0, dtype=np.int64)
        padded[mask] = tokens[positions]
        batch[name] = torch.from_numpy(padded)
    batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    return batch
