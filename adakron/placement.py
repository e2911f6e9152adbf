"""Where adapters go: the layers of each architecture, or those that a regular expression names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from adakron.backbone import head_modules, is_inside
from adakron.errors import ConfigError
from adakron.nn import layer_width
from adakron.untrusted import UnreadableError, time_limit

Position = Literal["ffn", "attention", "both"]
"""Behind the feed-forward block, behind the self-attention, or behind each."""


@dataclass(frozen=True)
class Placement:
    """Regular expressions, matched against whole module names, of the two places in every layer of an architecture.

    ffn: the last projection of the feed-forward block.
    attention: the output projection of the self-attention. The cross-attention of an encoder-decoder is neither.

    The adapter follows the projection, before dropout, LayerNorm and the residual sum. In an encoder-decoder both stacks match.
    """

    ffn: str
    attention: str

    def pattern(self, position: Position) -> str:
        """The regular expression of a position."""
        return {"ffn": self.ffn, "attention": self.attention, "both": f"{self.ffn}|{self.attention}"}[position]


def _layers(prefix: str, *, ffn: str, attention: str) -> Placement:
    """Both places of the layers that the prefix names; before it may stand the name of the backbone inside its model."""
    return Placement(rf"(.+\.)?{prefix}\.{ffn}", rf"(.+\.)?{prefix}\.{attention}")


_BERT = _layers(r"encoder\.layer\.\d+", ffn=r"output\.dense", attention=r"attention\.output\.dense")
_LLAMA = _layers(r"layers\.\d+", ffn=r"mlp\.down_proj", attention=r"self_attn\.o_proj")
_T5 = _layers(r"(encoder|decoder)\.block\.\d+\.layer\.\d+", ffn=r"DenseReluDense\.wo", attention=r"SelfAttention\.o")

PLACEMENT: dict[str, Placement] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta": _BERT,
    "deberta-v2": _BERT,
    "distilbert": _layers(r"transformer\.layer\.\d+", ffn=r"ffn\.lin2", attention=r"attention\.out_lin"),
    # A layer, and its adapter, is used at every depth of its group.
    "albert": _layers(r"encoder\.albert_layer_groups\.\d+\.albert_layers\.\d+", ffn="ffn_output", attention=r"attention\.dense"),
    "mpnet": _layers(r"encoder\.layer\.\d+", ffn=r"output\.dense", attention=r"attention\.attn\.o"),
    "modernbert": _layers(r"layers\.\d+", ffn=r"mlp\.Wo", attention=r"attn\.Wo"),
    "gpt2": _layers(r"h\.\d+", ffn=r"mlp\.c_proj", attention=r"attn\.c_proj"),
    "gpt_neo": _layers(r"h\.\d+", ffn=r"mlp\.c_proj", attention=r"attn\.attention\.out_proj"),
    "gptj": _layers(r"h\.\d+", ffn=r"mlp\.fc_out", attention=r"attn\.out_proj"),
    "opt": _layers(r"layers\.\d+", ffn="fc2", attention=r"self_attn\.out_proj"),
    "bloom": _layers(r"h\.\d+", ffn=r"mlp\.dense_4h_to_h", attention=r"self_attention\.dense"),
    "phi": _layers(r"layers\.\d+", ffn=r"mlp\.fc2", attention=r"self_attn\.dense"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "t5": _T5,
    "mt5": _T5,
    "bart": _layers(r"(encoder|decoder)\.layers\.\d+", ffn="fc2", attention=r"self_attn\.out_proj"),
}
"""Model type, as transformers spells it in config.json -> its places."""


_MATCHING_SECONDS = 3.0


def sites_without_rows(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Those of the sites whose input is not known to have a row for each text, so that texts cannot be told apart there.

    OPT's feed-forward blocks see the tokens of all texts in one row; of architectures that are not in PLACEMENT nothing is known
    (XLNet's layers see the tokens of a position together).
    """
    config: Any = model.config
    if config.model_type not in PLACEMENT:
        return list(sites)
    if config.model_type != "opt":
        return []
    return [site for site in sites if re.fullmatch(r"(.+\.)?layers\.\d+\.fc[12]", site)]


def find_sites(
    model: PreTrainedModel,
    target_modules: str | None = None,
    *,
    position: Position = "ffn",
    exclude_modules: str | None = None,
    layers: str | None = None,
) -> list[str]:
    """Names of the layers to adapt, in model order.

    target_modules: regular expression matched against whole module names; None takes the architecture's entry in PLACEMENT.
    position: which places of that entry; without effect beside target_modules.
    exclude_modules: regular expression matched against whole module names; what it matches is left out.
    layers: layer numbers and ranges from 0, both ends included, e.g. "0,2-5"; only sites in these layers remain. The number of
    a site is the first component of its name that is one, so it counts within each stack of an encoder-decoder, and is the
    group's in ALBERT.
    Raises ConfigError, with the candidates, on an unknown architecture, a broken expression or list of layers, no match, a match
    that is not a linear layer or is never called, exclusions that match no site, layers that no site lies in, and nothing left.
    """
    problems = _argument_problems(target_modules, position, exclude_modules, layers)
    if problems:
        raise ConfigError(problems)
    pattern = _pattern(model, position) if target_modules is None else target_modules
    named = matched("target_modules", pattern, [name for name, _ in model.named_modules()])
    matches = {name: module for name, module in model.named_modules() if name in named}
    if not matches:
        raise ConfigError(
            f"target_modules {pattern!r} matches no module of {type(model).__name__}; it is matched against whole module names"
            f" (set --target_modules). {_candidates(model)}"
        )
    if exclude_modules is not None:
        matches = _without(matches, exclude_modules)
    wrong = [f"{name} ({type(module).__name__})" for name, module in matches.items() if not _is_linear(module)]
    if wrong:
        raise ConfigError(
            f"target_modules {pattern!r} matches modules that are not linear layers: {some_of(wrong)}; adapters go behind linear"
            f" layers only (set --target_modules). {_candidates(model)}"
        )
    _check_called(model)
    return list(matches) if layers is None else _in_layers(list(matches), layers)


def matched(setting: str, pattern: str, names: Sequence[str]) -> set[str]:
    """The names that a regular expression matches as a whole. ConfigError where that does not end, as `(.+)+x` does not."""
    try:
        with time_limit(_MATCHING_SECONDS, "matching it with the names of the model's modules"):
            return {name for name in names if re.fullmatch(pattern, name)}
    except UnreadableError as error:
        raise ConfigError(
            f"{setting} {pattern!r} cannot be used: {error}; repeat no group that repeats something itself, as in (.+)+ (set --{setting})"
        ) from None


def _argument_problems(target_modules: str | None, position: str, exclude_modules: str | None, layers: str | None) -> list[str]:
    problems = []
    if position not in get_args(Position):
        problems.append(f"position is {position!r}; it must be one of {', '.join(get_args(Position))} (set --position)")
    for name, pattern in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            problems.append(f"{name} {pattern!r} is not a regular expression: {error} (set --{name})")
    if layers is not None and _ranges(layers) is None:
        problems.append(f"layers is {layers!r}; it must be layer numbers and ranges from low to high, such as 0,2-5 (set --layers)")
    return problems


def _pattern(model: PreTrainedModel, position: Position) -> str:
    model_type = model.config.model_type
    if model_type not in PLACEMENT:
        raise ConfigError(
            f"no adapter placement is known for model type {model_type!r} (known: {', '.join(PLACEMENT)}); name the layers to adapt with"
            f" --target_modules, a regular expression matched against whole module names. {_candidates(model)}"
        )
    return PLACEMENT[model_type].pattern(position)


def _without(sites: dict[str, nn.Module], exclude_modules: str) -> dict[str, nn.Module]:
    excluded = matched("exclude_modules", exclude_modules, [*sites])
    kept = {name: module for name, module in sites.items() if name not in excluded}
    if len(kept) == len(sites):
        raise ConfigError(
            f"exclude_modules {exclude_modules!r} matches none of the layers to adapt, {some_of([*sites])}; it is matched against whole"
            " module names (set --exclude_modules, or drop it)"
        )
    if not kept:
        raise ConfigError(f"exclude_modules {exclude_modules!r} leaves no layer to adapt of {some_of([*sites])} (set --exclude_modules)")
    return kept


def _check_called(model: PreTrainedModel) -> None:
    # This BLOOM multiplies by slices of the weights itself, so that an adapter behind the layer would silently do nothing.
    if getattr(model.config, "slow_but_exact", False) and getattr(model.config, "pretraining_tp", 1) > 1:
        raise ConfigError(
            f"{type(model).__name__} with slow_but_exact and pretraining_tp {model.config.pretraining_tp} goes past the layers to adapt;"
            " adapters need layers that are called (set slow_but_exact to false in the config.json of --model_name_or_path)"
        )


def _ranges(layers: str) -> list[tuple[int, int]] | None:
    """First and last number of each part, or None where the text is no such list."""
    found = []
    for part in layers.split(","):
        # Six digits: more layers than any model has, and fewer digits than int() refuses.
        numbers = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
        if numbers is None:
            return None
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first > last:
            return None
        found.append((first, last))
    return found


def _in_layers(sites: Sequence[str], layers: str) -> list[str]:
    number = {site: next((int(part) for part in site.split(".") if re.fullmatch("[0-9]+", part)), None) for site in sites}
    present = sorted({layer for layer in number.values() if layer is not None})
    wanted = {layer for first, last in _ranges(layers) or [] for layer in range(first, last + 1)}
    absent = sorted(wanted - {*present})
    if absent:
        raise ConfigError(
            f"layers {layers!r} names {some_of([*map(str, absent)])}; the layers to adapt lie in {some_of([*map(str, present)]) or 'none'}"
            " (set --layers)"
        )
    return [site for site in sites if number[site] in wanted]


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
