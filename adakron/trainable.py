"""What trains in a model: named, frozen and thawed, counted, grouped for the optimizer.

It is decided by module, never by a substring of a parameter's name: the adapters, the head modules whole, and parameters of the
backbone that a method names one by one.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from adakron import weights
from adakron.backbone import is_inside
from adakron.errors import ConfigError
from adakron.placement import some_of


@dataclass(frozen=True)
class AdaptedModelInfo:
    """What trains in a model, by name.

    sites: the adapted layers, in model order. head_modules: modules that train whole.
    adapter_parameters: parameters of the adapters. tuned_parameters: parameters of the backbone that train (bitfit, full).
    """

    sites: tuple[str, ...]
    head_modules: tuple[str, ...]
    adapter_parameters: tuple[str, ...] = ()
    tuned_parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParameterReport:
    """Parameter counts; a shared parameter counts once.

    adapter, head: trained. backbone: all others. tuned: those of the backbone that train. sites: number of adapters.
    """

    adapter: int
    head: int
    backbone: int
    sites: int
    tuned: int = 0

    @property
    def percent(self) -> float:
        """What trains without the head as a share of the backbone, in percent, as the papers count."""
        return 100.0 * (self.adapter + self.tuned) / max(1, self.backbone)

    @property
    def trainable(self) -> int:
        """All parameters that train."""
        return self.adapter + self.head + self.tuned

    @property
    def total(self) -> int:
        """All parameters."""
        return self.adapter + self.head + self.backbone

    @property
    def trainable_percent(self) -> float:
        """All that trains as a share of all parameters, in percent."""
        return 100.0 * self.trainable / max(1, self.total)


def train_only(model: PreTrainedModel, info: AdaptedModelInfo) -> None:
    """Freeze everything but what the info names."""
    model.requires_grad_(False)
    for parameter in _trained(model, info):
        parameter.requires_grad_(True)


def assert_trainable(model: nn.Module, info: AdaptedModelInfo) -> None:
    """Verify that exactly what the info names trains; ConfigError naming what differs, or that nothing trains."""
    expected = {id(p) for p in _trained(model, info)}
    if not expected:
        raise ConfigError(f"nothing would be trained: {type(model).__name__} has neither adapters nor a head (set --method adakron)")
    frozen = [name for name, p in model.named_parameters() if id(p) in expected and not p.requires_grad]
    loose = [name for name, p in model.named_parameters() if id(p) not in expected and p.requires_grad]
    problems = [f"parameters of adapters or head are frozen: {some_of(frozen)}"] if frozen else []
    problems += [f"parameters of the backbone would be trained: {some_of(loose)}"] if loose else []
    if problems:
        raise ConfigError(problems)


def parameter_report(model: nn.Module, info: AdaptedModelInfo) -> ParameterReport:
    """Counts of adapter, head and backbone parameters, also where ZeRO stage 3 has partitioned them."""
    adapter = sum(weights.size(model.get_parameter(name)) for name in info.adapter_parameters)
    tuned = sum(weights.size(model.get_parameter(name)) for name in info.tuned_parameters)
    head = sum(map(weights.size, _head_parameters(model, info)))
    backbone = sum(map(weights.size, model.parameters())) - adapter - head
    return ParameterReport(adapter=adapter, head=head, backbone=backbone, sites=len(info.sites), tuned=tuned)


def trainable_groups(model: nn.Module, weight_decay: float, vectors: Collection[str] = ()) -> list[dict[str, Any]]:
    """Optimizer groups of all parameters that train: matrices with weight decay, biases and norm weights without it. A weight_decay
    of 0 makes one group of all.

    vectors: names of parameters to treat as vectors though they have two dimensions.
    Norm weights are vectors, and so is every bias but that of a stack of experts. A group without parameters is left out:
    DeepSpeed cannot partition it.
    """
    if weight_decay == 0.0:  # DeepSpeed reduces, flattens and steps group by group
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad], "weight_decay": 0.0}]
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = len(weights.shape(parameter)) > 1
            (decayed if is_matrix and name.rpartition(".")[2] != "bias" and name not in vectors else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def trained_names(model: nn.Module, info: AdaptedModelInfo) -> set[str]:
    """Names of the parameters that the info lets train, as `named_parameters` has them; of a shared one the first."""
    trained = {id(parameter) for parameter in _trained(model, info)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in trained}


def _trained(model: nn.Module, info: AdaptedModelInfo) -> list[nn.Parameter]:
    named = [model.get_parameter(name) for name in (*info.adapter_parameters, *info.tuned_parameters)]
    return named + _head_parameters(model, info)


def _head_parameters(model: nn.Module, info: AdaptedModelInfo) -> list[nn.Parameter]:
    # A head may share parameters with the backbone (tied embeddings); those stay the backbone's.
    frozen = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if not is_inside(name, info.head_modules)}
    found = [parameter for name in info.head_modules for parameter in model.get_submodule(name).parameters()]
    return [parameter for parameter in found if id(parameter) not in frozen]
