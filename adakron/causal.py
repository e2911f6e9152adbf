"""What a causal language model computes beyond what transformers asks of it: logits at targets only, and rows of several examples.

Both are asked for by extra keyword arguments of a forward pass, which two hooks take out again before the model sees them:

target_positions: (N,) int64, places in the flattened (B T) tokens. The hidden states there alone reach the vocabulary projection,
    so the output's logits are (1, N, V), in that order, and no others are ever computed.
segments: (B, T) int64, which example of its row a token belongs to, from 1; 0 is padding. A token then attends to the tokens of its
    own example up to itself. position_ids must start again with every example.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from adakron.errors import ConfigError

PACKABLE = ("gpt2", "gptj", "opt", "phi", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""Model types that take positions and a whole attention mask from outside, so that packed examples are computed as if alone.

Not BLOOM, whose biases come from the place in the row, and not GPT-Neo, whose local layers count their window there.
"""


def accept_targets(model: nn.Module) -> None:
    """Let the model take `target_positions` and `segments`, if it has a vocabulary projection; every other pass is as before.

    model: the outermost module that will be called, adapters included, before an engine has it.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    projection = find() if find is not None else None
    if projection is not None:
        selection = _Selection()
        model.register_forward_pre_hook(selection.begin, with_kwargs=True)
        projection.register_forward_pre_hook(selection.select)
        model.register_forward_hook(selection.end, always_call=True)


class _Selection:
    """The hooks' shared state. A class, so that a copied model gets a copy of it and not the original's."""

    def __init__(self) -> None:
        self._positions: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._positions = kwargs.pop("target_positions", None)
        segments = kwargs.pop("segments", None)
        if segments is not None:
            kwargs["attention_mask"] = isolating_mask(segments, next(module.parameters()).dtype)
        return args, kwargs

    def select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._positions is None:
            return None
        hidden_BTD, *others = args
        hidden_1ND = hidden_BTD.flatten(0, 1).index_select(0, self._positions).unsqueeze(0)
        return (hidden_1ND, *others)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._positions = None


def isolating_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, (B, 1, T, T): 0 for keys of the query's own segment up to the query, else dtype's minimum.

    Padding attends to padding: a row without any key would be undefined.
    """
    same_BTT = segments.unsqueeze(2) == segments.unsqueeze(1)
    mask_B1TT = torch.zeros(same_BTT.shape, dtype=dtype, device=segments.device)
    return mask_B1TT.masked_fill_(~same_BTT.tril(), torch.finfo(dtype).min).unsqueeze(1)


def check_packing(model: nn.Module, longest: int) -> None:
    """ConfigError where packed examples of up to `longest` tokens would not be computed as if each had a row of its own."""
    config: Any = model.config
    problem = ""
    if config.model_type not in PACKABLE:
        problem = f"model type {config.model_type!r} takes no positions or no attention mask of ours (those that do: {', '.join(PACKABLE)})"
    elif getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        problem = f"attn_implementation {config._attn_implementation} takes no attention mask (set --attn_implementation sdpa or eager)"
    elif longest > _window(config):
        problem = f"its layers attend to {_window(config)} tokens back, which a packed row cannot hold for examples of up to {longest}"
    if problem:
        raise ConfigError(f"pack computes the examples of a row apart, and {type(model).__name__} cannot: {problem}; drop --pack")


def _window(config: Any) -> int:
    """How many tokens, itself included, a token sees in a layer of local attention; a very large number where there is none."""
    window = getattr(config, "sliding_window", None)
    is_used = {*(getattr(config, "layer_types", None) or ["sliding_attention"])} != {"full_attention"}
    return int(window) if window is not None and is_used else sys.maxsize
