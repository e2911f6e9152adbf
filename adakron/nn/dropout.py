"""Dropout whose masks belong to examples: what a row loses does not depend on which rows, ranks or padding it trains beside.

The keep-mask of an element is a hash of (seed, step, pass, example, call, position): the run's seed, optimizer steps done, forward
pass of the micro-batch, the row's place in the training split, which dropout of the forward pass it is, and where in the row the
element stands. No generator is advanced.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakron.errors import ConfigError
from adakron.nn import counters, native

_ROWS, _SHARED = 0, 1  # first counter below the seed: masks of examples, and draws that all rows of a step share

_FRAMEWORK = "set --dropout_masks framework"


@dataclass(frozen=True)
class _Pass:
    """A forward pass. keys: (B,) of its rows, on the host. shared: key of what all rows of its step share. tokens: T of its input."""

    keys: Tensor
    shared: int
    tokens: int = 0


class DropoutMasks:
    """Masks for the forward passes of one model's training. The loop says where it stands before each: `training_pass`.

    seed: of the run, 64 bits. While `running` is entered, dropout of torch, also inside attention, takes its masks from here.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._next: _Pass | None = None
        self._pass: _Pass | None = None
        self._keys: Tensor | None = None  # of the pass, on the device of what is dropped
        self._calls = 0
        self.places: Tensor | None = None
        """(N,) places in the flattened (B T) of the tokens that stand in one row, (1, N, D); None: each example has its row."""

    def training_pass(self, step: int, index: int, examples: np.ndarray) -> None:
        """The next forward pass. step: optimizer steps done. index: pass of the micro-batch. examples: (B,) places in the split."""
        rows = counters.key_of(self.seed, (_ROWS, step, index))
        shared = counters.key_of(self.seed, (_SHARED, step, index))
        self._next = _Pass(torch.from_numpy(counters.mixed_array(rows, np.asarray(examples))), shared)

    @property
    def is_running(self) -> bool:
        """Whether a forward pass takes its masks from here now."""
        return self._pass is not None

    @contextmanager
    def running(self, rows: int, tokens: int) -> Iterator[None]:
        """Around the forward pass that was announced. rows: B of its input. tokens: T, padding included."""
        if self._next is None or len(self._next.keys) != rows:
            known = "none was" if self._next is None else f"{len(self._next.keys)} were"
            raise ConfigError(f"a forward pass in training has {rows} rows, and {known} announced to DropoutMasks.training_pass")
        with self._at(_Pass(self._next.keys, self._next.shared, tokens), calls=0):
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` for `torch.utils.checkpoint`: what is computed again in the backward pass is given the same masks again."""
        return nullcontext(), (self._at(self._pass, self._calls) if self._pass is not None else nullcontext())

    @contextmanager
    def _at(self, place: _Pass, calls: int) -> Iterator[None]:
        before = self._pass, self._keys, self._calls
        self._pass, self._keys, self._calls = place, None, calls
        try:
            with _substituted(self):
                yield
        finally:
            self._pass, self._keys, self._calls = before

    def noise(self, x: Tensor, p: float, *, shared: bool = False) -> Tensor:
        """What dropout with probability p multiplies x by: 0 for dropped elements, 1 / (1 - p) for others; x's shape and dtype.

        x: an example's elements in each row, (B, ...), its tokens as (B, T, D) or flattened to (B T, D); attention (B, H, T, T).
        shared: x belongs to the step and not to examples; all micro-batches of the step lose the same.
        p is rounded to a multiple of 2^-16, and elements are scaled for the rounded one. Raises ConfigError on other shapes.
        """
        return _noise(self._row_keys(x, shared), p, x)

    def _row_keys(self, x: Tensor, shared: bool) -> Tensor:
        """The keys of x's rows of the last dimension: an example's, then one counter for each dimension in between."""
        assert self._pass is not None
        call, self._calls = self._calls, self._calls + 1
        rows, tokens = len(self._pass.keys), self._pass.tokens
        if shared:
            between = tuple(x.shape[:-1])
            keys = torch.tensor(counters.signed(counters.mixed(self._pass.shared, call)), device=x.device)
        elif self.places is not None and x.shape[:-1] in ((1, len(self.places)), (len(self.places),)):
            keys = counters.mixed_tensor(counters.mixed_with(self._on(x.device), call), tokens)
            return keys.flatten()[self.places].view(x.shape[:-1])
        else:
            if x.dim() >= 2 and x.shape[0] == rows:
                between = tuple(x.shape[1:-1])
            elif x.dim() == 2 and x.shape[0] == rows * tokens:
                between = (tokens,)
            else:
                raise ConfigError(
                    f"dropout of a tensor of shape {tuple(x.shape)} in a forward pass of {rows} rows and {tokens} tokens: masks that"
                    f" belong to examples cannot tell which element belongs to which example ({_FRAMEWORK})"
                )
            keys = counters.mixed_with(self._on(x.device), call)
        for size in between:
            keys = counters.mixed_tensor(keys, size)
        return keys

    def token_keys(self) -> Tensor:
        """The keys of the tokens that stand in one row, (N,) on the host: of the next dropout of the pass, (N, D). By a kernel."""
        assert self._pass is not None and self.places is not None
        call, self._calls = self._calls, self._calls + 1
        out = torch.empty_like(self.places)
        native.call("row_keys", None, self._pass.keys, call, self.places, self._pass.tokens, out, len(out))
        return out

    def text_keys(self) -> Tensor:
        """The keys of the pass's texts, (B,) on the host: of the next dropout of attention's weights, (B, H, T, T)."""
        assert self._pass is not None
        call, self._calls = self._calls, self._calls + 1
        return counters.mixed_with(self._pass.keys, call)

    def _on(self, device: torch.device) -> Tensor:
        assert self._pass is not None
        if self._keys is None or self._keys.device != device:
            self._keys = self._pass.keys.to(device, non_blocking=True)
        return self._keys

    def dropped(self, x: Tensor, p: float, *, inplace: bool = False, shared: bool = False) -> Tensor:
        """x after dropout. See `noise`."""
        if inplace:
            return x.mul_(self.noise(x, p, shared=shared))
        result: Tensor = _Dropped.apply(x, self._row_keys(x, shared), p)
        return result

    def shared_uniform(self) -> float:
        """A number in [0, 1) that all micro-batches and ranks of the step share: whether a layer is skipped."""
        assert self._pass is not None
        call, self._calls = self._calls, self._calls + 1
        return counters.uniform(counters.mixed(self._pass.shared, call))


def _noise(row_keys: Tensor, p: float, like: Tensor) -> Tensor:
    limit = counters.threshold(p)
    noise = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return counters.at_least(row_keys, limit, noise).mul_(1.0 / counters.share_kept(limit))


def _drop(x: Tensor, row_keys: Tensor, p: float) -> Tensor:
    if not (native.takes(x) and row_keys.shape == x.shape[:-1]):
        return _noise(row_keys, p, x).mul_(x)
    limit, width = counters.threshold(p), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    noise = row_keys.contiguous(), counters.column_keys(width, x.device), limit, 1.0 / counters.share_kept(limit)
    native.call("dropout", x.dtype, x.contiguous(), *noise, out, row_keys.numel(), width)
    return out


class _Dropped(torch.autograd.Function):
    """x times its noise, which the backward pass makes again: that takes less time than fresh memory to keep it in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row_keys: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(row_keys)
        ctx.p = p
        return _drop(x, row_keys, p)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (row_keys,) = ctx.saved_tensors
        return _drop(gradient, row_keys, ctx.p), None, None


class TableDropout(nn.Module):
    """Dropout of a table that all examples share, such as DeBERTa's relative positions (rows, D): one mask for a whole step."""

    def __init__(self, p: float, masks: DropoutMasks):
        super().__init__()
        self.p = p
        self._masks = masks

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) to (rows, D)."""
        if not (self.training and self.p > 0 and self._masks.is_running):
            return F.dropout(x, self.p, self.training)
        return self._masks.dropped(x, self.p, shared=True)

    def extra_repr(self) -> str:
        """As of `nn.Dropout`."""
        return f"p={self.p}"


def _attention(
    masks: DropoutMasks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`scaled_dot_product_attention` written out, (B, H, T, D) each, with masks on the attention's weights (B, H, T, T)."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        attn_mask = causal if attn_mask is None else attn_mask & causal
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return masks.dropped(weights, dropout_p) @ value


_WITHOUT_ROWS = ("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


@contextmanager
def _substituted(masks: DropoutMasks) -> Iterator[None]:
    """Let torch's dropout functions ask `masks`.

    Models call them by these names: `nn.Dropout`, eager attention and the blocks of BART or OPT all end here. A TorchFunctionMode
    would see the same calls, and costs several microseconds for every other operation of the forward pass.
    """
    attention, rand, dropout = F.scaled_dot_product_attention, torch.rand, F.dropout

    def masked_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not 0.0 < p < 1.0:
            return dropout(input, p, training, inplace)
        return masks.dropped(input, p, inplace=inplace)

    def masked_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p == 0.0:
            return attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        return _attention(masks, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def shared_rand(*size: Any, **options: Any) -> Tensor:
        # One number decides on a layer or an adapter (layerdrop, PEFT's module_dropout); more of them are not dropout's.
        if size not in (([],), ((),), (1,)) or options:
            return rand(*size, **options)
        return torch.full(size if size == (1,) else (), masks.shared_uniform())

    def refusing(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def refused(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
            if training and p > 0.0:
                raise ConfigError(f"the model uses {name}, for which there are no masks that belong to examples ({_FRAMEWORK})")
            return original(input, p, training, inplace)

        return refused

    originals: dict[tuple[Any, str], Any] = {
        (F, "dropout"): masked_dropout,
        (F, "scaled_dot_product_attention"): masked_attention,
        (torch, "rand"): shared_rand,
        **{(F, name): refusing(name, getattr(F, name)) for name in _WITHOUT_ROWS},
    }
    before = {place: getattr(*place) for place in originals}
    for place, function in originals.items():
        setattr(*place, function)
    try:
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)
