"""Encoders that compute no padding: inside the stack of layers all tokens of a micro-batch stand in one row, and nothing else does.

Linear layers, norms, dropout and adapters work on tokens one by one, so they do not need the padding that makes a rectangle of
examples. Attention is the one place where tokens meet: it sees every text by itself, by a kernel or in a rectangle made for the moment.
Embeddings before the stack and the head behind it see the rectangle. Results are those of padded batches up to the rounding of sums.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from adakron.encoder_layers import ROLES, EncoderLayer, layers_of
from adakron.nn import DropoutMasks, Row

STACKS = {
    "bert": "encoder", "roberta": "encoder", "xlm-roberta": "encoder", "camembert": "encoder", "electra": "encoder",
    "distilbert": "transformer", "albert": "encoder",
}  # fmt: skip
"""Model types whose layers look at tokens together in plain attention alone, and the name of their stack in the backbone.

Not MPNet, DeBERTa and ModernBERT, whose attention counts the distance of tokens in the row.
"""


class Unpadding:
    """The hooks of one model. masks: of its dropout, which must know which token stands where."""

    def __init__(self, masks: DropoutMasks | None):
        self._masks = masks
        self._row_of_pass: Row | None = None
        self._row: Row | None = None

    def now(self) -> Row | None:
        """The row that tokens stand in, inside the stack."""
        return self._row

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: its mask tells tokens from padding. Evaluation keeps its padding, of which it has little."""
        mask = kwargs.get("attention_mask")
        shown = any(
            kwargs.get(f"output_{what}") or getattr(module.config, f"output_{what}", False) for what in ("attentions", "hidden_states")
        )
        if module.training and mask is not None and mask.dim() == 2 and not shown:
            self._row_of_pass = Row.of(mask)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the stack."""
        row = self._row_of_pass
        if row is None:
            return None
        self.stand_in(row)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": row.take(kwargs["hidden_states"])}
        return (row.take(args[0]), *args[1:]), kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the stack."""
        if self._row is None:
            return None
        output.last_hidden_state = self._row.put(output.last_hidden_state)
        self.stand_in(None)
        return output

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind the model, also where it failed."""
        self._row_of_pass = None
        self.stand_in(None)

    def stand_in(self, row: Row | None) -> None:
        """Tokens stand in this row from here on, or in a rectangle."""
        self._row = row
        if self._masks is not None:
            self._masks.places = row.places if row is not None else None

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` for `torch.utils.checkpoint`: what is computed again in the backward pass stands in the same row again."""
        return nullcontext(), self._as(self._row)

    @contextmanager
    def _as(self, row: Row | None) -> Iterator[None]:
        before = self._row
        self.stand_in(row)
        try:
            yield
        finally:
            self.stand_in(before)


def unpad(model: Any, masks: DropoutMasks | None) -> Unpadding | str:
    """Let a model compute no padding while it trains; else why it cannot, and it is left as it is.

    model: of transformers, with its adapters, also one that PEFT wraps, before an engine has it and before its activations are
    checkpointed. masks: what `randomness.mask_dropout` returned.
    """
    if hasattr(model, "get_base_model"):  # PEFT's
        if model.active_peft_config.is_prompt_learning:
            return "its method puts tokens of its own before every text"
        model = model.get_base_model()
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
    layers = layers_of(stack, kind)
    if not layers:
        return f"its {STACKS[kind]} has no layers of that type"
    unpadding = Unpadding(masks)
    last = layers[-1] if _reads_firsts(model) else None
    for layer in layers:
        EncoderLayer(layer, ROLES[kind], now=unpadding.now, narrow=unpadding.stand_in, masks=masks, only_firsts=layer is last).install()
    model.register_forward_pre_hook(unpadding.begin, with_kwargs=True)
    model.register_forward_hook(unpadding.end, always_call=True)
    stack.register_forward_pre_hook(unpadding.enter, with_kwargs=True)
    stack.register_forward_hook(unpadding.leave)
    return unpadding


def _reads_firsts(model: Any) -> bool:
    """Whether a model's head reads its backbone at the first token of a text alone: transformers' classifiers of the types of `STACKS`
    do. ALBERT's last layer is also its first.
    """
    return type(model).__name__.endswith("ForSequenceClassification") and model.config.model_type != "albert"
