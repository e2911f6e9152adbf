"""Dropout of a whole model that depends on its examples and not on how they are batched: the model's side of `nn.dropout`."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from adakron.errors import ConfigError
from adakron.log import get_logger
from adakron.nn import DropoutMasks, Router, TableDropout

logger = get_logger(__name__)

_WRITTEN_OUT = ("eager", "sdpa")
"""Attention code of transformers whose dropout is torch's: others draw inside a kernel."""


def mask_dropout(model: nn.Module, seed: int) -> DropoutMasks:
    """Let every dropout of a model draw its masks from counters, while it trains; the loop announces each pass to the result.

    model: a model of transformers with its adapters, also one that PEFT wraps, before an engine has it. Its own dropout, that of
    PEFT's adapters and layers that are skipped at random (layerdrop, PEFT's module_dropout) are covered. What else the model
    draws stays with torch's generator; a warning after the first pass says so.
    Raises ConfigError where dropout happens inside an attention kernel.
    """
    _check_attention(getattr(model, "config", None))
    masks = DropoutMasks(seed)
    for name, module in list(model.named_modules()):
        # DeBERTa drops entries of its table of relative positions: rows there are no examples.
        if type(module) is nn.Dropout and name.rpartition(".")[2] == "pos_dropout":
            model.set_submodule(name, TableDropout(module.p, masks).train(module.training))
    _follow_passes(model, masks)
    return masks


class Place(Protocol):
    """Where a forward pass of training stands: `passes.ForwardPass`."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def micro_step(self) -> int:
        """Micro-batch of the step on this rank."""

    @property
    def index(self) -> int:
        """Pass of the micro-batch."""

    @property
    def examples(self) -> np.ndarray:
        """(B,) the rows' places in the training split."""


def announcer(router: Router | None, masks: DropoutMasks | None) -> Callable[[Place], None]:
    """What tells a model's counters, as far as it has any, of every forward pass before it."""

    def announce(place: Place) -> None:
        if router is not None:
            router.training_pass(place.step, place.micro_step, place.index)
        if masks is not None:
            masks.training_pass(place.step, place.index, place.examples)

    return announce


def _check_attention(config: Any) -> None:
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if implementation in _WRITTEN_OUT:
        return
    rates = {
        name: value
        for name, value in config.to_dict().items()
        if re.search(r"(attn|attention).*drop", name) and isinstance(value, float) and value > 0
    }
    if rates:
        found = ", ".join(f"{name} {value}" for name, value in rates.items())
        raise ConfigError(
            f"attn_implementation {implementation} drops attention weights inside its kernel ({found}), where masks that belong to"
            " examples cannot reach; set --attn_implementation sdpa or eager, or --dropout_masks framework, or --dropout 0"
        )


def _follow_passes(model: nn.Module, masks: DropoutMasks) -> None:
    """Enter the masks around every forward pass of the model in training mode."""
    passes: list[ExitStack] = []
    generators: list[list[Tensor]] = []
    seen_one = False

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        inputs = next(iter(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        inputs = args[0] if inputs is None else inputs
        passes.append(ExitStack())
        passes[-1].enter_context(masks.running(*inputs.shape[:2]))
        if not seen_one:
            generators.append(_generator_states(inputs.device))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal seen_one
        if passes:
            passes.pop().close()
        if generators:
            before = generators.pop()
            seen_one = True
            device = next(module.parameters()).device
            if not all(torch.equal(old, new) for old, new in zip(before, _generator_states(device), strict=True)):
                logger.warning(
                    "--dropout_masks per_example: this model also draws random numbers that are not dropout's; they come from torch's"
                    " generator, one stream per rank, so results depend on batch geometry"
                )

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, always_call=True)


def _generator_states(device: torch.device) -> list[Tensor]:
    # Kept on the host for every kind of device: reading them waits for nothing.
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
