"""Put adapters into a backbone: where (placement per architecture), what trains, and how much that is.

What trains is decided by module, never by a substring of a parameter's name: the adapters, and the head modules whole.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adakron.backbone import (
    NewParameters,
    check_attention,
    head_modules,
    is_inside,
    load_config,
    model_class,
    quiet_transformers,
    reason_of,
)
from adakron.config import AdapterConfig, ModelConfig
from adakron.errors import ConfigError
from adakron.nn import AdaptedLayer, KroneckerAdapter, adapter_parameter_count, layer_width
from adakron.placement import find_sites, some_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A run's precision as torch names it."""


@dataclass(frozen=True)
class AdaptedModelInfo:
    """What trains in a model: names of the adapted layers in model order, and of the head modules."""

    sites: tuple[str, ...]
    head_modules: tuple[str, ...]


@dataclass(frozen=True)
class ParameterReport:
    """Parameter counts; a shared parameter counts once.

    adapter, head: trained. backbone: frozen. sites: number of adapters.
    percent: adapter parameters as a share of the backbone's, in percent, as the papers count (without the head).
    """

    adapter: int
    head: int
    backbone: int
    percent: float
    sites: int

    @property
    def trainable_percent(self) -> float:
        """Adapter and head parameters as a share of all, in percent."""
        return 100.0 * (self.adapter + self.head) / max(1, self.adapter + self.head + self.backbone)


def check_architecture(config: ModelConfig, adapter: AdapterConfig, *, auto_class: str, options: Mapping[str, Any]) -> AdaptedModelInfo:
    """Everything that can be wrong with backbone and placement, found without reading weights or using memory.

    The model is built on the meta device from its configuration alone. Raises ConfigError.
    """
    architecture = load_config(config, options)
    auto = model_class(auto_class)
    with quiet_transformers(), torch.device("meta"):
        try:
            model = auto.from_config(architecture, trust_remote_code=config.trust_remote_code)
        except ValueError as error:
            raise ConfigError(
                f"model type {architecture.model_type!r} has no {auto_class}: {reason_of(error)} (set --model_name_or_path)"
            ) from error
    check_attention(config, architecture, auto_class)
    return adapt(model, adapter, seed=0)


def adapt(
    model: PreTrainedModel,
    config: AdapterConfig,
    *,
    seed: int,
    new_parameters: NewParameters = NewParameters(),  # noqa: B008, an immutable value
    heads: Sequence[str] | None = None,
) -> AdaptedModelInfo:
    """Inject adapters (method "adakron"; "head" injects none), freeze the backbone, and let adapters and head train.

    seed: of the adapters' initial values, which are the same on every rank and leave the global random state alone.
    new_parameters: what the checkpoint did not hold or never used, as `load_backbone` returns it.
    heads: names of the head modules, where they are known already (a saved adapter); default: `backbone.head_modules`.
    Raises ConfigError on targets or head modules that do not fit the model, on random parameters that would stay frozen, and on
    adapters that are larger than this machine's memory.
    """
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise ConfigError(f"this {type(model).__name__} already has adapters; load the backbone anew")
    names = _declared_head(model, config) or head_modules(model, new_parameters.names) if heads is None else tuple(heads)
    sites = find_sites(model, config.target_modules) if config.method == "adakron" else []
    overlap = [site for site in sites if is_inside(site, names)]
    if overlap:
        raise ConfigError(
            f"target_modules matches layers of the head, which is trained whole: {some_of(overlap)} (narrow --target_modules)"
        )
    problems = _frozen_at_random(model, new_parameters, names) + _memory_problems(model, config, sites)
    if problems:
        raise ConfigError(problems)
    generator = torch.Generator("cpu").manual_seed(seed)
    for site in sites:
        base_layer = model.get_submodule(site)
        weight: Any = base_layer.weight
        adapter = KroneckerAdapter(
            layer_width(base_layer),
            config.bottleneck_dim,
            kron_factor=config.kron_factor,
            factor_order=config.factor_order,
            activation=config.activation,
            init=config.adapter_init,
            init_std=config.init_std,
            device=weight.device,
            # A quantised weight is an integer tensor; its layer's output has the dtype of the rest of the model.
            dtype=weight.dtype if weight.is_floating_point() else model.dtype,
            generator=generator,
        )
        model.set_submodule(site, AdaptedLayer(base_layer, adapter).train(base_layer.training))
    model.requires_grad_(False)
    info = AdaptedModelInfo(tuple(sites), names)
    for parameter in [*_adapter_parameters(model, info), *_head_parameters(model, info)]:
        parameter.requires_grad_(True)
    return info


def _declared_head(model: PreTrainedModel, config: AdapterConfig) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (config.head_modules or "").split(",") if name.strip())
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown:
        children = [name for name, module in known.items() if name and name.count(".") < 2 and any(True for _ in module.parameters())]
        raise ConfigError(f"head_modules names {', '.join(unknown)}, not in the model; it has {some_of(children)} (set --head_modules)")
    return names


def _frozen_at_random(model: PreTrainedModel, new_parameters: NewParameters, heads: Sequence[str]) -> list[str]:
    frozen = [name for name in new_parameters.missing if not is_inside(name, heads)]
    if not frozen:
        return []
    homes = [module for module in head_modules(model, new_parameters.missing) if any(is_inside(name, [module]) for name in frozen)]
    return [
        f"head_modules ({', '.join(heads)}) leaves out {', '.join(homes)}: the checkpoint does not hold {some_of(frozen)}, which would"
        " stay random and frozen (name these modules in --head_modules as well, or drop it)"
    ]


def _memory_problems(model: PreTrainedModel, config: AdapterConfig, sites: Sequence[str]) -> list[str]:
    widths = [layer_width(model.get_submodule(site)) for site in sites]
    parameters = sum(adapter_parameter_count(width, config.bottleneck_dim, config.kron_factor) for width in widths)
    # 4 bytes: the values alone, in float32; gradients and optimizer state come on top, but may lie elsewhere.
    needed, present = 4 * parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= present:
        return []
    return [
        f"adapters with bottleneck_dim {config.bottleneck_dim} behind {len(sites)} layers have {parameters:,} parameters and need"
        f" {needed / 2**30:,.0f} GiB, this machine has {present / 2**30:,.0f} GiB of memory (set a smaller --bottleneck_dim)"
    ]


def assert_trainable(model: PreTrainedModel, info: AdaptedModelInfo) -> None:
    """Verify that exactly the adapters and the head train; ConfigError naming what differs, or that nothing trains."""
    expected = {id(p) for p in [*_adapter_parameters(model, info), *_head_parameters(model, info)]}
    if not expected:
        raise ConfigError(f"nothing would be trained: {type(model).__name__} has neither adapters nor a head (set --method adakron)")
    frozen = [name for name, p in model.named_parameters() if id(p) in expected and not p.requires_grad]
    loose = [name for name, p in model.named_parameters() if id(p) not in expected and p.requires_grad]
    problems = [f"parameters of adapters or head are frozen: {some_of(frozen)}"] if frozen else []
    problems += [f"parameters of the backbone would be trained: {some_of(loose)}"] if loose else []
    if problems:
        raise ConfigError(problems)


def parameter_report(model: PreTrainedModel, info: AdaptedModelInfo) -> ParameterReport:
    """Counts of adapter, head and backbone parameters, also where ZeRO stage 3 has partitioned them."""
    adapter = sum(map(_size, _adapter_parameters(model, info)))
    head = sum(map(_size, _head_parameters(model, info)))
    backbone = sum(map(_size, model.parameters())) - adapter - head
    return ParameterReport(adapter, head, backbone, 100.0 * adapter / max(1, backbone), len(info.sites))


def trainable_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of all parameters that train: matrices with weight decay, biases and norm weights without.

    Norm weights are vectors, and so is every bias but that of a stack of experts. A group without parameters is left out:
    DeepSpeed cannot partition it.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            (decayed if is_matrix and name.rpartition(".")[2] != "bias" else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adapter_parameters(model: nn.Module, info: AdaptedModelInfo) -> list[nn.Parameter]:
    adapters = [model.get_submodule(site) for site in info.sites]
    return [parameter for layer in adapters if isinstance(layer, AdaptedLayer) for parameter in layer.adakron_adapter.parameters()]


def _head_parameters(model: PreTrainedModel, info: AdaptedModelInfo) -> list[nn.Parameter]:
    # A head may share parameters with the backbone (tied embeddings); those stay the backbone's.
    frozen = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if not is_inside(name, info.head_modules)}
    found = [parameter for name in info.head_modules for parameter in model.get_submodule(name).parameters()]
    return [parameter for parameter in found if id(parameter) not in frozen]


def _size(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
