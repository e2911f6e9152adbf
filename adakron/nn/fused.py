"""What an encoder computes between its matrix products, each as one kernel of `native.py` with its backward pass.

All texts of a micro-batch stand in one row of tokens, one behind the other; so they are rows of matrices here. Frozen weights get no
gradients. Tensor-name suffixes: N tokens, D hidden, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adakron.nn import counters, native


@dataclass(frozen=True)
class Noise:
    """Dropout of rows. keys: int64, of what has masks of its own (a row, or a text in attention), see `dropout.py`. p: in (0, 1)."""

    keys: Tensor
    p: float

    def arguments(self, columns: int) -> tuple[Tensor, Tensor, int, float]:
        """As kernels want it. columns: of a row."""
        limit = counters.threshold(self.p)
        return self.keys, counters.column_keys(columns, self.keys.device), limit, 1.0 / counters.share_kept(limit)


_NO_NOISE = (None, None, 0, 1.0)


def add_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, noise: Noise | None) -> Tensor:
    """LayerNorm(dropout(x) + residual), (N, D); noise: a key for each row, None for no dropout."""
    out: Tensor = _AddNorm.apply(x_ND.contiguous(), residual_ND.contiguous(), weight_D, bias_D, eps, noise)
    return out


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, noise: Noise | None) -> Tensor:
        rows, width = x.shape
        dropping = noise.arguments(width) if noise is not None else _NO_NOISE
        total, out, moments = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, 2, dtype=torch.float32)
        native.call("add_norm", x.dtype, x, residual, *dropping, weight, bias, eps, total, moments, out, rows, width)
        ctx.save_for_backward(total, moments, weight)
        ctx.noise = noise
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, moments, weight = ctx.saved_tensors
        rows, width = total.shape
        dropping = ctx.noise.arguments(width) if ctx.noise is not None else _NO_NOISE
        to_residual = torch.empty_like(total)
        to_x = torch.empty_like(total) if ctx.noise is not None else to_residual
        native.call(
            "add_norm_backward", total.dtype, gradient.contiguous(), total, moments, *dropping, weight, to_x, to_residual, rows, width
        )
        return to_x, to_residual, None, None, None, None


@dataclass(frozen=True)
class Texts:
    """Where texts begin in the rows of queries, and of keys and values: int64, (B + 1,) each, on the host. longest: no text has more
    keys.
    """

    queries: Tensor
    keys: Tensor
    longest: int


def attention(parts: tuple[Tensor, ...], texts: Texts, heads: int, scaling: float, noise: Noise | None) -> Tensor:
    """Attention of every text to itself.

    parts: the queries, keys and values, (N, H * depth) each and in this order: one matrix with all side by side, or the queries and a
    matrix of the two others, or three. texts: theirs. scaling: of the scores. noise: a key for each text; weights are dropped.
    Returns a row for each query, 0 behind the last text.
    """
    out: Tensor = _Attention.apply(texts, heads, scaling, noise, *(part.contiguous() for part in parts))
    return out


def side_by_side(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of parts as `attention` takes them."""
    if len(parts) == 1:
        queries, keys, values = parts[0].chunk(3, -1)
    elif len(parts) == 2:
        queries, (keys, values) = parts[0], parts[1].chunk(2, -1)
    else:
        queries, keys, values = parts
    return queries, keys, values


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, texts: Texts, heads: int, scaling: float, noise: Noise | None, *parts: Tensor) -> Tensor:
        queries, keys, values = side_by_side(parts)
        out = queries.new_zeros(queries.shape)
        logs = queries.new_empty(len(queries), heads, dtype=torch.float32)
        head = _texts(texts, heads, queries.shape[-1], noise, scaling)
        native.call("attention", out.dtype, *head, queries, queries.stride(0), keys, values, keys.stride(0), out, logs)
        ctx.save_for_backward(logs, *parts)
        ctx.rest = texts, heads, scaling, noise
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logs, *parts = ctx.saved_tensors
        texts, heads, scaling, noise = ctx.rest
        queries, keys, values = side_by_side(tuple(parts))
        gradients = tuple(map(torch.zeros_like, parts))
        to_queries, to_keys, to_values = side_by_side(gradients)
        head = _texts(texts, heads, queries.shape[-1], noise, scaling)
        native.call(
            "attention_backward", gradient.dtype, *head, gradient.contiguous(), queries, queries.stride(0), keys, values, keys.stride(0),
            logs, to_queries, to_queries.stride(0), to_keys, to_values, to_keys.stride(0),
        )  # fmt: skip
        return None, None, None, None, *gradients


def _texts(texts: Texts, heads: int, width: int, noise: Noise | None, scaling: float) -> tuple[Any, ...]:
    dropping = noise.arguments(texts.longest) if noise is not None else _NO_NOISE
    return texts.queries, texts.keys, len(texts.keys) - 1, heads, width // heads, *dropping, scaling
