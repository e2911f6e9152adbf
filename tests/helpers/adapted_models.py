"""Tiny models with a method's adapters, and what tests ask of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adakron.backbone import is_inside
from adakron.config import AdapterConfig
from adakron.methods import METHODS
from adakron.models import adapt
from adakron.nn import AdaptedLayer, Router
from adakron.trainable import AdaptedModelInfo
from tests.helpers.architectures import PLACES, tiny_batch, tiny_model

WIDTH, LAYERS = 32, 2
CLASSIFIER = "AutoModelForSequenceClassification"
Settings = Mapping[str, Any]


def expected_sites(model_type: str, position: str) -> list[str]:
    """The adapted layers of the two-layer classifier, in model order."""
    sites = []
    for stack, attention, ffn in PLACES[model_type]:
        places = {"ffn": [ffn], "attention": [attention], "both": [attention, ffn]}[position]
        numbers = range(LAYERS) if "N" in stack else [0]
        sites += [f"{stack.replace('N', str(n))}.{place}" for n in numbers for place in places]
    return sites


def config_of(settings: Settings) -> AdapterConfig:
    """Resolved settings of small adapters."""
    return AdapterConfig(**({"bottleneck_dim": 8} | dict(settings))).resolved()


def position_of(settings: Settings) -> str:
    """Where the method's adapters stand."""
    return str(settings.get("position") or METHODS[settings.get("method", "adakron")].position)


def has_adapters(settings: Settings) -> bool:
    """Whether the method puts adapters into the backbone."""
    return METHODS[settings.get("method", "adakron")].trains == "adapters"


def adapted(model_type: str, settings: Settings, *, auto_class: str = CLASSIFIER) -> tuple[PreTrainedModel, AdaptedModelInfo]:
    """A tiny model with the method's adapters, in evaluation mode."""
    model = plain(model_type, auto_class=auto_class)
    return model, adapt(model, config_of(settings), seed=1)


def plain(model_type: str, *, auto_class: str = CLASSIFIER) -> PreTrainedModel:
    """The tiny model itself, with weights that keep activations near 1 as in a trained model.

    Most architectures start at a standard deviation of 0.02. In 32 dimensions activations would shrink to 0.01, and what an
    adapter makes of them, which is quadratic, to the rounding error of float32.
    """
    model = tiny_model(model_type, auto_class=auto_class)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, WIDTH**-0.5, generator=generator)
    return model


def forward(model: PreTrainedModel) -> Tensor:
    """Logits (3, 3) of a batch with padding."""
    result: Tensor = model(**tiny_batch()).logits
    return result


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """The same without a gradient: torch's fused attention takes another way, bits apart, where T5's position bias trains."""
    return forward(model)


def switch(model: PreTrainedModel, enabled: bool) -> None:
    """Turn all adapters on or off."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            module.enabled = enabled


def gradients(model: PreTrainedModel, router: Router | None = None) -> dict[str, Tensor]:
    """Of the sum of squared logits, by parameter name; parameters that collect none are left out.

    router: goes on to the next pass before the backward pass, as it does in a consistency loss.
    """
    model.zero_grad()
    loss = forward(model).square().sum()
    if router is not None:
        router.training_pass(0, 0, 1)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def disturb(model: PreTrainedModel) -> None:
    """Move every parameter that trains, as training does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))


def last_norm(model_type: str, head: Sequence[str]) -> str:
    """Name of the last norm layer outside the head: a module of the backbone, and never adapted."""
    names = [name for name, module in plain(model_type).named_modules() if "norm" in type(module).__name__.lower()]
    return [name for name in names if not is_inside(name, head)][-1]
