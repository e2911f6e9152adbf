"""From the logits of windows to the best spans of each question: what is kept of a window, and how windows are put together."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adakron.data.windows import CONTEXT, NULL

_PAIRS_AT_ONCE = 2**20  # of starts and ends, which bounds the memory for them


def window_outputs(logits: Tensor, roles: Tensor, count: int, losses: Tensor) -> Tensor:
    """(B, 4 count + 3) fp32: of each window the `count` best starts and ends in the context, and its null score.

    logits: (B, 2, T) fp32, of starts and ends. roles: (B, T). losses: (B,). Columns: logits of the starts, their positions, logits of
    the ends, their positions, the null token's two logits, the loss. Where a context has fewer tokens the position is -1. Positions
    below 2^24 are exact in fp32.
    """
    best = min(count, logits.shape[-1])
    values, positions = logits.masked_fill(roles[:, None] != CONTEXT, -torch.inf).topk(best, dim=-1)
    missing = values == -torch.inf
    values = values.masked_fill(missing, 0.0)
    positions = positions.masked_fill(missing, -1).float()
    candidates = torch.stack([values, positions], dim=2)  # (B, 2, 2, best): starts and ends; logits and positions
    candidates = torch.nn.functional.pad(candidates, (0, count - best))
    candidates[:, :, 1, best:] = -1.0
    null = logits.masked_fill(roles[:, None] != NULL, 0.0).sum(-1)
    return torch.cat([candidates.flatten(1), null, losses[:, None]], dim=1)


@dataclass(frozen=True)
class WindowScores:
    """What `window_outputs` made, taken apart: starts, ends (N, 2, count) logits and positions; null (N, 2) logits; losses (N,)."""

    starts: np.ndarray
    ends: np.ndarray
    null: np.ndarray
    losses: np.ndarray

    @staticmethod
    def of(outputs: np.ndarray, count: int) -> "WindowScores":
        """From (N, 4 count + 3)."""
        assert outputs.shape[1] == 4 * count + 3, f"{outputs.shape[1]} columns for {count} candidates"
        candidates = outputs[:, : 4 * count].reshape(-1, 2, 2, count)
        return WindowScores(candidates[:, 0], candidates[:, 1], outputs[:, -3:-1], outputs[:, -1])


@dataclass(frozen=True)
class Spans:
    """Spans of tokens, those of a question together and the best first; 1-D arrays of one length.

    questions, windows: where each is from. firsts, lasts: its tokens, inclusive, in the window. start_logits, end_logits: fp64.
    """

    questions: np.ndarray
    windows: np.ndarray
    firsts: np.ndarray
    lasts: np.ndarray
    start_logits: np.ndarray
    end_logits: np.ndarray


def best_spans(scores: WindowScores, questions: np.ndarray, count: int, max_tokens: int) -> Spans:
    """The `count` spans of each question with the largest sums of logits, over all its windows.

    questions: (N,) the question of each window. max_tokens: longest span. A span begins no later than it ends. Equal sums keep the
    order of windows, then of starts and ends by their own logits.
    """
    at_once = max(1, _PAIRS_AT_ONCE // scores.starts.shape[-1] ** 2)
    parts = [_best_in_windows(scores, slice(at, at + at_once), count, max_tokens) for at in range(0, len(questions), at_once)]
    windows = np.concatenate([part[0] + at * at_once for at, part in enumerate(parts)])
    firsts, lasts, start_logits, end_logits = (np.concatenate([part[1][column] for part in parts]) for column in range(4))
    order = np.lexsort((-(start_logits + end_logits), questions[windows]))
    owners = questions[windows][order]
    rank = np.arange(len(owners)) - np.searchsorted(owners, owners, side="left")
    kept = order[rank < count]
    return Spans(
        questions=questions[windows][kept],
        windows=windows[kept],
        firsts=firsts[kept].astype(np.int64),
        lasts=lasts[kept].astype(np.int64),
        start_logits=start_logits[kept],
        end_logits=end_logits[kept],
    )


def _best_in_windows(scores: WindowScores, chosen: slice, count: int, max_tokens: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Windows, counted from the slice's first, and [firsts, lasts, start logits, end logits] of their `count` best spans."""
    starts, ends = scores.starts[chosen].astype(np.float64), scores.ends[chosen].astype(np.float64)
    firsts, lasts = starts[:, 1, :, None], ends[:, 1, None, :]
    possible = (firsts >= 0) & (lasts >= firsts) & (lasts - firsts < max_tokens)
    sums = np.where(possible, starts[:, 0, :, None] + ends[:, 0, None, :], -np.inf).reshape(len(starts), -1)
    places = np.argsort(-sums, axis=1, kind="stable")[:, :count]
    windows, columns = np.nonzero(np.isfinite(np.take_along_axis(sums, places, axis=1)))
    start_at, end_at = np.divmod(places[windows, columns], ends.shape[2])
    return windows, [starts[windows, 1, start_at], ends[windows, 1, end_at], starts[windows, 0, start_at], ends[windows, 0, end_at]]
