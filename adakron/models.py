"""Put adapters into a backbone and let them train; what a run asks of a model that has them."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adakron.architecture import check_attention, load_config, model_class
from adakron.backbone import NewParameters, head_modules, is_inside
from adakron.config import AdapterConfig, ModelConfig
from adakron.errors import ConfigError
from adakron.methods import METHODS
from adakron.nn import AdaptedLayer, BottleneckAdapter, Projection, Router, TableDropout, adapter_parameter_count, layer_width
from adakron.placement import find_sites, sites_without_rows, some_of
from adakron.pretrained import quiet_transformers, reason_of
from adakron.trainable import AdaptedModelInfo, train_only

Context = AbstractContextManager[None]


def check_architecture(config: ModelConfig, adapter: AdapterConfig, *, auto_class: str, options: Mapping[str, Any]) -> AdaptedModelInfo:
    """Everything that can be wrong with backbone and placement, found without reading weights or using memory.

    The model is built on the meta device from its configuration alone. Of a method of PEFT's only the head is looked at, for
    PEFT's initialisations may read weights. Raises ConfigError.
    """
    architecture = load_config(config, options, auto_class)
    auto = model_class(auto_class)
    with quiet_transformers(), torch.device("meta"):
        try:
            model = auto.from_config(architecture, trust_remote_code=config.trust_remote_code)
        except ValueError as error:
            raise ConfigError(
                f"model type {architecture.model_type!r} has no {auto_class}: {reason_of(error)} (set --model_name_or_path)"
            ) from error
        # The library builds what the configuration says, and fails wherever a value does not fit.
        except Exception as error:
            raise ConfigError(
                f"no {auto_class} can be built from the config.json of model type {architecture.model_type!r}: {type(error).__name__},"
                f" {reason_of(error)} (set --model_name_or_path)"
            ) from error
    check_attention(config, architecture, auto_class)
    if adapter.preset is None:
        return AdaptedModelInfo((), head_to_train(model, adapter, NewParameters()))
    return adapt(model, adapter, seed=0)


def adapt(
    model: PreTrainedModel,
    config: AdapterConfig,
    *,
    seed: int,
    new_parameters: NewParameters = NewParameters(),  # noqa: B008, an immutable value
    heads: Sequence[str] | None = None,
) -> AdaptedModelInfo:
    """Inject the method's adapters, freeze the backbone, and let adapters, head and what else the method tunes train.

    config: a method of ours; those of PEFT are attached by `adakron.peft`.
    seed: of the adapters' initial values, which are the same on every rank and leave the global random state alone.
    new_parameters: what the checkpoint did not hold or never used, as `load_backbone` returns it.
    heads: names of the head modules, where they are known already (a saved adapter); default: `backbone.head_modules`.
    Raises ConfigError on targets or head modules that do not fit the model, on random parameters that would stay frozen, and on
    adapters that are larger than this machine's memory.
    """
    config = config.resolved()
    if config.preset is None:
        raise ConfigError(f"method {config.method!r} is none of {', '.join(METHODS)}; PEFT's methods are attached by adakron.peft")
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise ConfigError(f"this {type(model).__name__} already has adapters; load the backbone anew")
    names = head_to_train(model, config, new_parameters) if heads is None else tuple(heads)
    sites = sites_of(model, config)
    overlap = [site for site in sites if is_inside(site, names)]
    if overlap:
        raise ConfigError(
            f"target_modules matches layers of the head, which is trained whole: {some_of(overlap)} (narrow --target_modules)"
        )
    tuned = _tuned_parameters(model, config, names)
    flat = sites_without_rows(model, sites) if config.inference_level == 1 else []
    if flat:
        raise ConfigError(_flat_problem(flat))
    problems = frozen_at_random(model, new_parameters, names, tuned) + _memory_problems(model, config, sites)
    if problems:
        raise ConfigError(problems)
    generator = torch.Generator("cpu").manual_seed(seed)
    for site in sites:
        base_layer = model.get_submodule(site)
        adapter = new_adapter(base_layer, config, model.dtype, generator)
        model.set_submodule(site, AdaptedLayer(base_layer, adapter).train(base_layer.training))
    info = AdaptedModelInfo(tuple(sites), names, _adapter_parameters(model, sites), tuned)
    train_only(model, info)
    return info


def sites_of(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Names of the layers that resolved settings adapt, in model order; none for a method without adapters. See `find_sites`."""
    if not config.has_adapters:
        return []
    return find_sites(
        model,
        config.target_modules,
        position=config.position or "ffn",
        exclude_modules=config.exclude_modules,
        layers=config.layers,
    )


def new_adapter(
    base_layer: nn.Module, config: AdapterConfig, model_dtype: torch.dtype, generator: torch.Generator | None
) -> BottleneckAdapter:
    """An adapter for a linear layer, by resolved settings, on the layer's device and in its dtype.

    model_dtype: of the model around the layer, for a quantised layer. generator: of the initial values; None: PyTorch's global one.
    Raises ConfigError where the layer is not linear.
    """
    weight: Any = base_layer.weight
    return BottleneckAdapter(
        layer_width(base_layer),
        config.bottleneck_dim,
        **_adapter_options(config),
        device=weight.device,
        # A quantised weight is an integer tensor; its layer's output has the dtype of the rest of the model.
        dtype=weight.dtype if weight.is_floating_point() else model_dtype,
        generator=generator,
    )


def _adapter_options(config: AdapterConfig) -> dict[str, Any]:
    """Resolved settings as keyword arguments of `BottleneckAdapter`."""
    return {
        "bottleneck": config.bottleneck,
        "kron_factor": config.kron_factor,
        "factor_order": config.factor_order,
        "activation": config.activation,
        "init": config.adapter_init,
        "init_std": config.init_std,
        "num_experts": config.num_experts,
        "experts_in": config.expert_projections,
        "expert_scores": config.expert_scores,
        "tune_expert_scores": config.tune_expert_scores,
        "inference_level": config.inference_level,
    }


def route_experts(model: nn.Module, seed: int) -> Router | None:
    """Give the model's mixtures one router, which draws their experts from here on; None where there is no mixture."""
    adapters = [module for module in model.modules() if isinstance(module, BottleneckAdapter)]
    if all(adapter.num_experts == 1 for adapter in adapters):
        return None
    router = Router(seed, len(adapters))
    for site, adapter in enumerate(adapters):
        adapter.router, adapter.site = router, site
    return router


class Recomputed(Protocol):
    """State of a forward pass that must be there again where a part of it is computed again."""

    def checkpoint_contexts(self) -> tuple[Context, Context]:
        """What to enter around the first and the second computation."""


def checkpoint_activations(model: Any, *counters: Recomputed | None) -> None:
    """Compute each layer's activations again in the backward pass instead of keeping them; ConfigError where the model cannot.

    The layers draw the same dropout again. counters: the model's router, masks and unpadding, of which they get the same again.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"{type(model).__name__} cannot compute activations again; drop --gradient_checkpointing")
    options: dict[str, Any] = {"use_reentrant": False}
    used = [source for source in counters if source is not None]
    if used:
        options["context_fn"] = lambda: _together([source.checkpoint_contexts() for source in used])
    model.activation_checkpointing_enable(options)


def _together(pairs: Sequence[tuple[Context, Context]]) -> tuple[Context, Context]:
    """Pairs of contexts as one."""

    @contextmanager
    def entered(contexts: Sequence[Context]) -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield

    return entered([first for first, _ in pairs]), entered([second for _, second in pairs])


@torch.no_grad()
def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model a run's precision as DeepSpeed does: floating parameters, not the buffers (rotary frequencies, expert scores)."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def set_inference_level(model: nn.Module, level: Literal[0, 1, 3]) -> None:
    """Let evaluation use the experts of the model's mixtures in another way; ConfigError where there is no mixture."""
    mixtures = [module for module in model.modules() if isinstance(module, BottleneckAdapter) and module.num_experts > 1]
    if not mixtures:
        raise ConfigError(f"inference_level is {level}, but the model has no mixture of experts; drop --inference_level")
    flat = sites_without_rows(model, [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)])
    if level == 1 and flat:
        raise ConfigError(_flat_problem(flat))
    for mixture in mixtures:
        mixture.inference_level = level


def adapter_buffers(model: nn.Module, info: AdaptedModelInfo) -> dict[str, Tensor]:
    """Copies of what adapters hold besides their parameters (expert scores that do not train), float32, by name in the model."""
    return {
        name: buffer.detach().to("cpu", torch.float32, copy=True)
        for name, buffer in model.named_buffers()
        if is_inside(name, [f"{site}.adakron_adapter" for site in info.sites])
    }


def is_random_in_training(model: nn.Module) -> bool:
    """Whether two forward passes in training mode can differ: by dropout, or by the choice of experts."""
    if any(isinstance(module, Projection) and module.num_experts > 1 and not module.tunes_scores for module in model.modules()):
        return True
    return has_dropout(model)


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass in training mode drops anything, activations or layers."""
    if any(isinstance(module, nn.Dropout | TableDropout) and module.p > 0 for module in model.modules()):
        return True
    # Functional dropout and skipped layers: their rates are numbers that modules hold. The configuration also has unused ones.
    rates = [value for module in model.modules() for name, value in vars(module).items() if re.search(r"dropout|pdrop|layerdrop", name)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _flat_problem(sites: Sequence[str]) -> str:
    return (
        f"inference_level 1 draws one expert per text, but {some_of(sites)} may not see each text in a row of its own (set"
        " --inference_level 0 or 3)"
    )


def _tuned_parameters(model: PreTrainedModel, config: AdapterConfig, heads: Sequence[str]) -> tuple[str, ...]:
    assert config.preset is not None
    backbone = [name for name, _ in model.named_parameters() if not is_inside(name, heads)]
    if config.preset.trains == "all":
        return tuple(backbone)
    if config.preset.trains != "bias":
        return ()
    # The attribute is called bias, or, in some attention layers, q_bias and the like.
    biases = tuple(name for name in backbone if re.fullmatch(r"(\w+_)?bias", name.rpartition(".")[2]))
    if not biases:
        raise ConfigError(f"method bitfit trains biases, and {type(model).__name__} has none outside its head; choose another --method")
    return biases


def head_to_train(model: PreTrainedModel, config: AdapterConfig, new_parameters: NewParameters) -> tuple[str, ...]:
    """Names of the modules that train whole: those that the settings name, else `backbone.head_modules`. ConfigError on unknown names."""
    names = tuple(name.strip() for name in (config.head_modules or "").split(",") if name.strip())
    known = dict(model.named_modules())
    twice = sorted({name for name in names if any(is_inside(name, [other]) for other in names if other != name) or names.count(name) > 1})
    if twice:
        raise ConfigError(f"head_modules names {', '.join(twice)} twice, by itself or inside another (set --head_modules)")
    unknown = [name for name in names if name not in known]
    if unknown:
        children = [name for name, module in known.items() if name and name.count(".") < 2 and any(True for _ in module.parameters())]
        raise ConfigError(f"head_modules names {', '.join(unknown)}, not in the model; it has {some_of(children)} (set --head_modules)")
    return names or head_modules(model, new_parameters.names)


def frozen_at_random(model: PreTrainedModel, new_parameters: NewParameters, heads: Sequence[str], tuned: Sequence[str] = ()) -> list[str]:
    """What is wrong, in words, where parameters that the checkpoint does not hold would neither be in the head nor train."""
    frozen = [name for name in new_parameters.missing if not is_inside(name, heads) and name not in set(tuned)]
    if not frozen:
        return []
    homes = [module for module in head_modules(model, new_parameters.missing) if any(is_inside(name, [module]) for name in frozen)]
    return [
        f"head_modules ({', '.join(heads)}) leaves out {', '.join(homes)}: the checkpoint does not hold {some_of(frozen)}, which would"
        " stay random and frozen (name these modules in --head_modules as well, or drop it)"
    ]


def _memory_problems(model: PreTrainedModel, config: AdapterConfig, sites: Sequence[str]) -> list[str]:
    widths = [layer_width(model.get_submodule(site)) for site in sites]
    parameters = sum(expected_adapter_parameters(width, config) for width in widths)
    # 4 bytes: the values alone, in float32; gradients and optimizer state come on top, but may lie elsewhere.
    needed, present = 4 * parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= present:
        return []
    return [
        f"adapters with bottleneck_dim {config.bottleneck_dim} behind {len(sites)} layers have {parameters:,} parameters and need"
        f" {needed / 2**30:,.0f} GiB, this machine has {present / 2**30:,.0f} GiB of memory (set a smaller --bottleneck_dim)"
    ]


def expected_adapter_parameters(hidden_dim: int, config: AdapterConfig) -> int:
    """Trainable numbers of one adapter of that width with resolved settings, by the closed form."""
    return adapter_parameter_count(
        hidden_dim,
        config.bottleneck_dim,
        config.kron_factor,
        bottleneck=config.bottleneck,
        num_experts=config.num_experts or 1,
        experts_in=config.expert_projections,
        tune_expert_scores=config.tune_expert_scores,
    )


def _adapter_parameters(model: nn.Module, sites: Sequence[str]) -> tuple[str, ...]:
    prefixes = [f"{site}.adakron_adapter" for site in sites]
    return tuple(f"{prefix}.{name}" for prefix in prefixes for name, _ in model.get_submodule(prefix).named_parameters())
