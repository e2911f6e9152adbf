"""Losses that tasks share: cross-entropy over a vocabulary in little memory, and how far two passes of the same examples disagree."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

OutputKind = Literal["logits", "values"]
"""What a task's outputs are: logits over classes or tokens in the last dimension, or real numbers."""


def consistency_sum(first: Tensor, second: Tensor, kind: OutputKind) -> Tensor:
    """The disagreement of two passes, summed over the targets; an fp32 scalar.

    first, second: outputs at the valid targets, (targets, classes) for logits, any shape for values.

    logits: with p and q the two distributions and sg a constant of the same value (no gradient),
    1/2 KL(sg(q) || p) + 1/2 KL(sg(p) || q) at each target. This is AdaMix's regulariser as AdaKron's repository has it
    (modeling_roberta.py:1261-1283, NLG/src/model.py:459-465), there averaged and not summed.
    values: 1/2 (first - sg(second))^2 + 1/2 (second - sg(first))^2. Ours: theirs takes a softmax over the one output of a
    regression and is identically zero.
    """
    first, second = first.float(), second.float()
    if kind == "values":
        return 0.5 * ((first - second.detach()).square().sum() + (second - first.detach()).square().sum())
    log_p, log_q = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    to_p = F.kl_div(log_p, log_q.detach(), reduction="sum", log_target=True)
    return 0.5 * (to_p + F.kl_div(log_q, log_p.detach(), reduction="sum", log_target=True))


_NUMBERS_AT_ONCE = 2**22  # fp32 logits beside the given ones: 16 MiB


def cross_entropy_sum(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats, summed over the targets; an fp32 scalar (float64 for float64 logits).

    logits: (N, V), of any precision. targets: (N,) int64. label_smoothing: torch's, (1 - e) nll + e mean_v(-log p_v), which is also that
    of the published generation code (NLG/src/model.py).
    Rows are taken a few at a time, in the forward and in the backward pass: beside the logits and their gradient no second (N, V)
    tensor is held, where torch's function keeps the fp32 logits and their log-softmax.
    """
    total: Tensor = _CrossEntropySum.apply(logits, targets, label_smoothing)
    return total


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) cross-entropy of each target in nats, without smoothing and without gradient, in fp32."""
    with torch.no_grad():
        return torch.cat([F.cross_entropy(_wide(logits[rows]), targets[rows], reduction="none") for rows in _slices(logits)])


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        log_sums = torch.empty(len(targets), dtype=total.dtype, device=logits.device)
        for rows in _slices(logits):
            values = _wide(logits[rows])
            log_sums[rows] = values.logsumexp(-1)
            chosen = values.gather(-1, targets[rows, None]).sum()
            total += log_sums[rows].sum() - (1.0 - label_smoothing) * chosen
            if label_smoothing:
                total -= label_smoothing * values.mean(-1).sum()
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.label_smoothing = label_smoothing
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, log_sums = ctx.saved_tensors
        smoothing = ctx.label_smoothing
        gradient = torch.empty_like(logits)
        for rows in _slices(logits):
            part = (_wide(logits[rows]) - log_sums[rows, None]).exp_()
            if smoothing:
                part -= smoothing / logits.shape[-1]
            part.scatter_add_(-1, targets[rows, None], torch.full_like(part[:, :1], smoothing - 1.0))
            gradient[rows] = part * grad_outputs[0]
        return gradient, None, None


def _slices(logits: Tensor) -> Iterator[slice]:
    height = max(1, _NUMBERS_AT_ONCE // logits.shape[-1])
    return (slice(start, start + height) for start in range(0, len(logits), height))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
