"""Where adapters go: the layers of each architecture, or those that a regular expression names."""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from adakron.backbone import head_modules, is_inside
from adakron.errors import ConfigError
from adakron.nn import layer_width

_ENCODER_OUTPUT = r"(.+\.)?encoder\.layer\.\d+\.output\.dense"

PLACEMENT: dict[str, str] = {
    "bert": _ENCODER_OUTPUT,
    "roberta": _ENCODER_OUTPUT,
    "electra": _ENCODER_OUTPUT,
    "deberta": _ENCODER_OUTPUT,
    "deberta-v2": _ENCODER_OUTPUT,
    "distilbert": r"(.+\.)?transformer\.layer\.\d+\.ffn\.lin2",
    "gpt2": r"(.+\.)?h\.\d+\.mlp\.c_proj",
}
"""Model type -> regular expression, matched against whole module names, of each layer's last FFN projection.

The adapter follows that projection, before dropout, LayerNorm and the residual sum, in every layer."""


def find_sites(model: PreTrainedModel, target_modules: str | None = None) -> list[str]:
    """Names of the layers to adapt, in model order.

    target_modules: regular expression matched against whole module names; None takes the architecture's entry in PLACEMENT.
    Raises ConfigError, with the candidates, on an unknown architecture, a broken expression, no match or a match that is not
    a linear layer.
    """
    model_type = model.config.model_type
    pattern = PLACEMENT.get(model_type) if target_modules is None else target_modules
    if pattern is None:
        raise ConfigError(
            f"no adapter placement is known for model type {model_type!r} (known: {', '.join(PLACEMENT)}); name the layers to adapt with"
            f" --target_modules, a regular expression matched against whole module names. {_candidates(model)}"
        )
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"target_modules {pattern!r} is not a regular expression: {error} (set --target_modules)") from None
    matches = [(name, module) for name, module in model.named_modules() if expression.fullmatch(name)]
    if not matches:
        raise ConfigError(
            f"target_modules {pattern!r} matches no module of {type(model).__name__}; it is matched against whole module names"
            f" (set --target_modules). {_candidates(model)}"
        )
    wrong = [f"{name} ({type(module).__name__})" for name, module in matches if not _is_linear(module)]
    if wrong:
        raise ConfigError(
            f"target_modules {pattern!r} matches modules that are not linear layers: {some_of(wrong)}; adapters go behind linear"
            f" layers only (set --target_modules). {_candidates(model)}"
        )
    return [name for name, _ in matches]


def _is_linear(module: nn.Module) -> bool:
    try:
        return layer_width(module) > 0
    except ConfigError:
        return False


def _candidates(model: PreTrainedModel) -> str:
    hidden = getattr(model.config, "hidden_size", None)
    heads = head_modules(model)
    linear = {
        re.sub(r"(?<=\.)\d+(?=\.)", "N", name): layer_width(module)
        for name, module in model.named_modules()
        if _is_linear(module) and not is_inside(name, heads)
    }
    names = [name for name, width in linear.items() if hidden is None or width == hidden] or list(linear)
    return f"Linear layers of the hidden width ({hidden}; N is a layer number): {some_of(names, 20)}"


def some_of(names: Sequence[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
