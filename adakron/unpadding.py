"""Encoders that compute no padding: inside the stack of layers all tokens of a micro-batch stand in one row, and nothing else does.

Linear layers, norms, dropout and adapters work on tokens one by one, so they do not need the padding that makes a rectangle of
examples. Attention is the one place where tokens meet: there the rectangle is made for the moment, and its padding masked as ever.
Embeddings before the stack and the head behind it see the rectangle. Results are those of padded batches up to the rounding of sums.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from adakron.nn import DropoutMasks

STACKS = {
    "bert": "encoder", "roberta": "encoder", "xlm-roberta": "encoder", "camembert": "encoder", "electra": "encoder",
    "distilbert": "transformer", "albert": "encoder",
}  # fmt: skip
"""Model types whose layers look at tokens together in plain attention alone, and the name of their stack in the backbone.

Not MPNet, DeBERTa and ModernBERT, whose attention counts the distance of tokens in the row.
"""

MULTIPLE = 32
"""The row's length is rounded up to a multiple of this by padding that is there anyway: libraries prepare and keep something for every
length they meet (oneDNN about a megabyte), and there would be as many lengths as steps.
"""

_NAME = "adakron_unpadded"  # of our attention, in transformers' registry
_OF_MODULE = "_adakron_unpadding"  # where a layer's attention finds its Unpadding


class _Rectangle:
    """A micro-batch's shape. places: (N,) int64, in the flattened (B T), of its tokens and of a little padding. mask: (B, 1, 1, T),
    True for tokens.
    """

    def __init__(self, attention_mask_BT: Tensor):
        self.rows, self.tokens = attention_mask_BT.shape
        # On a GPU the host waits here, once in a forward pass, to learn N.
        tokens = attention_mask_BT.flatten().nonzero().flatten()
        padding = (attention_mask_BT.flatten() == 0).nonzero().flatten()
        self.places = torch.cat([tokens, padding[: -len(tokens) % MULTIPLE]])
        self.mask = attention_mask_BT.bool()[:, None, None, :]

    def take(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (1, N, ...)."""
        flat: Tensor = _Take.apply(x.flatten(0, 1), self.places)
        return flat.unsqueeze(0)

    def put(self, x: Tensor) -> Tensor:
        """(1, N, ...) to (B, T, ...), 0 where there is no token."""
        flat: Tensor = _Put.apply(x.squeeze(0), self.places, self.rows * self.tokens)
        return flat.unflatten(0, (self.rows, self.tokens))


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


class Unpadding:
    """The hooks of one model. config: its own. masks: of its dropout, which must know which token stands where."""

    def __init__(self, config: Any, masks: DropoutMasks | None):
        self._config = config
        self._padded: str = config._attn_implementation
        self._masks = masks
        self._attention_mask: Tensor | None = None
        self._now: _Rectangle | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: its mask tells tokens from padding. Evaluation keeps its padding, of which it has little."""
        mask = kwargs.get("attention_mask")
        self._attention_mask = mask if module.training and mask is not None and mask.dim() == 2 else None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the stack."""
        if self._attention_mask is None:
            return None
        rectangle = _Rectangle(self._attention_mask)
        if len(rectangle.places) == self._attention_mask.numel():
            return None  # nothing to leave out
        self._be(rectangle)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": rectangle.take(kwargs["hidden_states"])}
        return (rectangle.take(args[0]), *args[1:]), kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the stack."""
        if self._now is None:
            return None
        output.last_hidden_state = self._now.put(output.last_hidden_state)
        self._be(None)
        return output

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind the model, also where it failed."""
        self._attention_mask = None
        self._be(None)

    def _be(self, rectangle: _Rectangle | None) -> None:
        self._now = rectangle
        # Its layers look their attention up by this name at every call. Outside the stack, and in evaluation, it is the model's own.
        self._config._attn_implementation = _NAME if rectangle is not None else self._padded
        if self._masks is not None:
            self._masks.places = rectangle.places if rectangle is not None else None

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` for `torch.utils.checkpoint`: what is computed again in the backward pass stands in the same row again."""
        return nullcontext(), self._as(self._now)

    @contextmanager
    def _as(self, rectangle: _Rectangle | None) -> Iterator[None]:
        before = self._now
        self._be(rectangle)
        try:
            yield
        finally:
            self._be(before)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
        """(1, H, N, D) each to (1, N, H, D)."""
        assert self._now is not None
        query, key, value = (self._now.put(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, self._now.mask, dropout, scale=scaling)
        return self._now.take(out.transpose(1, 2))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' interface. attention_mask: that of the rectangle, which its Unpadding has."""
    unpadding: Unpadding = getattr(module, _OF_MODULE)
    return unpadding.attend(query, key, value, dropout, scaling), None


def unpad(model: Any, masks: DropoutMasks | None) -> Unpadding | str:
    """Let a model compute no padding while it trains; else why it cannot, and it is left as it is.

    model: of transformers, with its adapters, before an engine has it and before its activations are checkpointed.
    masks: what `randomness.mask_dropout` returned.
    """
    kind, implementation = model.config.model_type, getattr(model.config, "_attn_implementation", None)
    if not hasattr(model, "base_model") or kind not in STACKS:
        return f"model type {kind!r} is none of {', '.join(STACKS)}"
    if implementation not in ("eager", "sdpa"):
        return f"its attention is {implementation}, neither eager nor sdpa"
    if getattr(model.config, "is_decoder", False):
        return "it is a decoder"
    try:
        stack = model.base_model.get_submodule(STACKS[kind])
    except AttributeError:
        return f"its backbone has no {STACKS[kind]}"
    AttentionInterface.register(_NAME, _attention)
    unpadding = Unpadding(model.config, masks)
    for module in stack.modules():
        setattr(module, _OF_MODULE, unpadding)
    model.register_forward_pre_hook(unpadding.begin, with_kwargs=True)
    model.register_forward_hook(unpadding.end, always_call=True)
    stack.register_forward_pre_hook(unpadding.enter, with_kwargs=True)
    stack.register_forward_hook(unpadding.leave)
    return unpadding
