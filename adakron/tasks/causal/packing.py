"""Several examples in one row: less padding, the same numbers."""

import heapq

import numpy as np
import torch

from adakron.data.collation import FlatTokens
from adakron.tasks.base import Batch


def pack_batch(
    encoded: FlatTokens, rows: np.ndarray, *, pad_token_id: int, pad_to_multiple_of: int, max_length: int | None
) -> tuple[Batch, np.ndarray]:
    """The examples in as few rows of up to max_length tokens as a greedy choice finds, and where in the flattened rows each begins.

    input_ids, position_ids (from 0 in every example) and segments (from 1 in every row, 0 for padding), each (R, T) int64.
    """
    lengths = np.diff(encoded.offsets)[rows]
    homes, columns = _places(lengths, int(max(lengths.max(), max_length or 0)))
    width = int((columns + lengths).max())
    width = max(min(-(-width // pad_to_multiple_of) * pad_to_multiple_of, max_length or width), width)
    shape = (int(homes.max()) + 1, width)
    starts = homes * width + columns
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.repeat(starts, lengths) + inside
    flat = {name: np.zeros(shape[0] * width, dtype=np.int64) for name in ("input_ids", "position_ids", "segments")}
    flat["input_ids"][:] = pad_token_id
    flat["input_ids"][places] = encoded.features["input_ids"][np.repeat(encoded.offsets[rows], lengths) + inside]
    flat["position_ids"][places] = inside
    flat["segments"][places] = np.repeat(np.arange(1, len(rows) + 1), lengths)
    return {name: torch.from_numpy(values.reshape(shape)) for name, values in flat.items()}, starts


def _places(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and first column of each example: longest first, each into the emptiest of the fewest rows; a new one where it does not fit."""
    homes, columns = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    used = [(0, row) for row in range(-(-int(lengths.sum()) // capacity))]  # a heap of (tokens, row)
    for example in np.argsort(-lengths, kind="stable"):
        tokens, row = used[0]
        if tokens + lengths[example] > capacity:
            tokens, row = 0, len(used)
            heapq.heappush(used, (0, row))
        homes[example], columns[example] = row, tokens
        heapq.heapreplace(used, (tokens + int(lengths[example]), row))
    return homes, columns
