"""From an adapter folder to a published checkpoint, or the reasons why the published code could not use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from adakron.adapter_folder import AdapterFolder, read_adapter_config
from adakron.adapter_io import read_adapter_tensors
from adakron.architecture import load_config
from adakron.backbone import is_inside
from adakron.config import ModelConfig
from adakron.errors import ConfigError
from adakron.placement import some_of
from adakron.reference.base import load_base
from adakron.reference.files import DDP_PREFIX, STATE_KEY
from adakron.reference.layout import (
    AUTO_CLASSES,
    HEADS,
    LAYOUTS,
    PREFIXES,
    PUBLISHED_FACTOR,
    PUBLISHED_NLG_WIDTH,
    Format,
    Layout,
    adapter_keys,
    home_of,
    published_sites,
    reorder_columns,
)
from adakron.reference.variants import Variant, derived_tensors

EXPORT_FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Exported:
    """content: what the published code saves, for `write_checkpoint`. layout: the code that reads it."""

    content: Mapping[str, Any]
    layout: Layout


def export_checkpoint(folder: str | Path, *, base: str | None = None, form: Format | None = None) -> Exported:
    """An adapter folder in the form in which AdaKron's or AdaMix's code saves it.

    base: folder or hub id of the backbone; default: the one the folder records. Only its configuration is read for "glue", and
    the whole of it for "nlg", whose files hold it. form: default: the one of the folder's kind of model.
    Where the folder was imported, the result has the tensors of the imported file, bit for bit.
    Raises ConfigError with everything that the published code cannot express, CheckpointError where the folder is damaged.
    """
    saved = read_adapter_config(folder)
    form = form or _format_of(saved, folder)
    base = base or saved.base_model
    layout = next((one for one in LAYOUTS if (one.format, one.bottleneck) == (form, saved.adapter.bottleneck)), None)
    if not saved.adapter.has_adapters or layout is None:
        raise ConfigError(f"{folder} holds method {saved.adapter.method}, which has no adapters to export")
    sites = _sites(saved, form, base)
    problems = _problems(saved, layout, sites)
    if problems:
        raise ConfigError([f"{folder} cannot be written for {layout.code}: {problem}" for problem in problems])
    tensors = read_adapter_tensors(folder)
    variant = Variant.from_extra(saved.extra, folder)
    adapters = _adapter_tensors(saved, layout, tensors, variant)
    if form == "glue":
        head = {name: tensor for name, tensor in tensors.items() if is_inside(name, HEADS[form])}
        return Exported({**adapters, **head}, layout)
    whole = {**_backbone_tensors(saved, base, variant), **adapters}
    return Exported({STATE_KEY: {(DDP_PREFIX if variant.ddp_prefix else "") + name: tensor for name, tensor in whole.items()}}, layout)


def _format_of(saved: AdapterFolder, folder: str | Path) -> Format:
    for form, auto_class in AUTO_CLASSES.items():
        if saved.auto_class == auto_class:
            return form
    raise ConfigError(
        f"{folder} was saved for {saved.auto_class}; the published codes train {' and '.join(AUTO_CLASSES.values())} and no other"
    )


def _sites(saved: AdapterFolder, form: Format, base: str) -> list[str]:
    """The layers that the published code would adapt in this backbone."""
    own = saved.sites[0].partition(".")[0] if saved.sites else ""
    prefix = own if own in PREFIXES[form] else PREFIXES[form][0]
    layers = getattr(load_config(ModelConfig(model_name_or_path=base), saved.model_options), "num_hidden_layers", 0)
    return published_sites(prefix, layers)


def _problems(saved: AdapterFolder, layout: Layout, sites: list[str]) -> list[str]:
    adapter = saved.adapter
    found = []
    if saved.auto_class != AUTO_CLASSES[layout.format]:
        found.append(f"it was saved for {saved.auto_class}, and format {layout.format} is for {AUTO_CLASSES[layout.format]} (set --format)")
    if list(saved.sites) != sites:
        lacking = [site for site in sites if site not in saved.sites]
        beyond = [site for site in saved.sites if site not in sites]
        parts = ([f"it lacks {some_of(lacking, 4)}"] if lacking else []) + ([f"it has {some_of(beyond, 4)}"] if beyond else [])
        found.append(
            f"that code adapts the feed-forward output of every layer of {'GPT-2' if layout.format == 'nlg' else 'BERT or RoBERTa'} and"
            f" nothing else, this folder does not: {', '.join(parts) or 'the order differs'}"
        )
    if adapter.bottleneck == "kronecker" and adapter.kron_factor != PUBLISHED_FACTOR:
        found.append(f"kron_factor is {adapter.kron_factor}, and that code has {PUBLISHED_FACTOR} fixed in it; train with --kron_factor 4")
    if layout.format == "nlg" and adapter.bottleneck_dim != PUBLISHED_NLG_WIDTH:
        found.append(
            f"bottleneck_dim is {adapter.bottleneck_dim}, and that code has {PUBLISHED_NLG_WIDTH} fixed in it; train with --bottleneck_dim"
            f" {PUBLISHED_NLG_WIDTH}"
        )
    if adapter.activation != layout.activation:
        found.append(
            f"activation is {adapter.activation}, and that code has {layout.activation} fixed in it; train with --activation"
            f" {layout.activation}"
        )
    mixed = [name for name in adapter.expert_projections if name not in layout.experts_in]
    if mixed:
        where = f"only in {', '.join(layout.experts_in)}" if layout.experts_in else "nowhere"
        found.append(f"{', '.join(mixed)} have several experts, and that code has them {where}; average them first (convert.py merge)")
    heads = HEADS[layout.format]
    if set(saved.head_modules) != set(heads):
        found.append(
            f"it trained {', '.join(saved.head_modules) or 'no head'}, and that code trains {', '.join(heads) or 'no head'}; train with"
            f" --head_modules {','.join(heads)}"
            if heads
            else f"it trained {', '.join(saved.head_modules)}, and that code trains no head"
        )
    if saved.tuned_parameters:
        found.append(f"it trained {len(saved.tuned_parameters)} parameters of the backbone")
    return found


def _adapter_tensors(saved: AdapterFolder, layout: Layout, tensors: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    adapter = saved.adapter
    result = {}
    for site in saved.sites:
        for key, name, expert in adapter_keys(layout, home_of(site), adapter.num_experts or 1, adapter.expert_projections):
            tensor = tensors.get(f"{site}.adakron_adapter.{name}")
            if tensor is None:
                tensor = torch.full((1,), variant.lone_scores.get(key, 0.0))
            elif expert is not None and name.partition(".")[0] in adapter.expert_projections:
                tensor = tensor[expert]
            if name == "up.weight" and adapter.bottleneck == "kronecker" and adapter.factor_order != layout.factor_order:
                tensor = reorder_columns(tensor, adapter.kron_factor, layout.factor_order)
            # A copy: torch.save writes the whole storage of a view.
            result[key] = tensor.clone(memory_format=torch.contiguous_format)
    return result


def _backbone_tensors(saved: AdapterFolder, base: str, variant: Variant) -> dict[str, Tensor]:
    """The frozen GPT-2 as a text-generation file holds it."""
    model = load_base(base, auto_class=saved.auto_class, options=saved.model_options, heads=())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if is_inside(name, [model.base_model_prefix])}
    if variant.causal_masks:
        tensors |= derived_tensors(model)
    if variant.output_key is not None:
        tensors[variant.output_key] = tensors["transformer.wte.weight"]
    return tensors
