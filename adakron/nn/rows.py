"""The tokens of a micro-batch in one row, without the padding that makes a rectangle of texts.

Tensor-name suffixes: B texts, T places of the rectangle's rows, N of the row.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MULTIPLE = 16
"""A row's length is rounded up to a multiple of this by padding that is there anyway: libraries prepare and keep something for every
length they meet (oneDNN about a megabyte), and there would be as many lengths as steps.
"""


@dataclass(frozen=True)
class Row:
    """places: (N,) int64, of what stands in the row, in the flattened rectangle (B T). mask_BT: bool, True for tokens.

    texts: (B + 1,) int64 on the host: where in the row each text begins, and where the last one ends. None where a text's tokens are
    not the first ones of its rectangle's row.
    """

    places: Tensor
    mask_BT: Tensor
    texts: Tensor | None

    @classmethod
    def of(cls, mask_BT: Tensor) -> "Row":
        """That of a mask, 0 for padding: text by text, then a little padding."""
        rows, columns = mask_BT.shape
        tokens_BT = mask_BT != 0
        # Distinct places from 0 on have the least sum. On a GPU the host waits here, once in a forward pass, to learn the sizes.
        sums = torch.stack([tokens_BT.sum(1), (tokens_BT * torch.arange(columns, device=mask_BT.device)).sum(1)]).cpu()
        lengths, places = sums.unbind()
        count = int(lengths.sum())
        flat = tokens_BT.flatten()
        tokens = torch.nonzero_static(flat, size=count).flatten()
        padding = torch.nonzero_static(~flat, size=min(-count % MULTIPLE, rows * columns - count)).flatten()
        texts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) if bool((2 * places == lengths * (lengths - 1)).all()) else None
        return cls(torch.cat([tokens, padding]), tokens_BT, texts)

    @cached_property
    def firsts(self) -> "Row | None":
        """The first token of every text alone; None where one has none."""
        if self.texts is None or not bool((self.texts[1:] > self.texts[:-1]).all()):
            return None
        rows, columns = self.mask_BT.shape
        return Row(torch.arange(rows, device=self.places.device) * columns, self.mask_BT, torch.arange(rows + 1))

    @property
    def attention_mask(self) -> Tensor:
        """(B, 1, 1, T), of keys."""
        return self.mask_BT[:, None, None, :]

    def take(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (1, N, ...)."""
        flat: Tensor = _Take.apply(x.flatten(0, 1), self.places)
        return flat.unsqueeze(0)

    def put(self, x: Tensor) -> Tensor:
        """(1, N, ...) to (B, T, ...), 0 where nothing of the row belongs."""
        flat: Tensor = _Put.apply(x.squeeze(0), self.places, self.mask_BT.numel())
        return flat.unflatten(0, self.mask_BT.shape)


class _Take(torch.autograd.Function):
    """Rows at places, each of which is there once: the gradient is copied back, where torch's own function would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, places, gradient), None


class _Put(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None
