"""What each method trains inside a backbone: the presets behind `--method`. Sources of the values: `docs/method.md`.

Standard library only. A name that is not here is a method of PEFT's.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Method:
    """The defaults that a method gives to the settings of the same names.

    trains: "adapters" puts bottleneck adapters into the backbone; "head" trains the task head alone, "bias" every bias of the
    backbone with it, "all" the whole model.
    bottleneck: how the adapters reach their bottleneck; the further fields concern adapters only.
    experts_in: the projections with experts where num_experts is above 1; empty where the method knows none.
    """

    trains: Literal["adapters", "head", "bias", "all"] = "adapters"
    bottleneck: Literal["kronecker", "plain"] = "kronecker"
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    position: Literal["ffn", "both"] = "ffn"
    num_experts: int = 1
    experts_in: tuple[str, ...] = ()


PROJECTIONS: dict[str, tuple[str, ...]] = {"kronecker": ("down_a", "down_b", "up"), "plain": ("down", "up")}
"""Bottleneck -> the names of its projections, the one up last; a name's index here is its slot for the router."""

METHODS = {
    "adakron": Method(experts_in=("down_a", "down_b")),
    "madakron": Method(num_experts=4, experts_in=("down_a", "down_b")),
    "madakron_partial": Method(num_experts=4, experts_in=("down_a",)),
    "adamix": Method(bottleneck="plain", num_experts=4, experts_in=("down",)),
    "pfeiffer": Method(bottleneck="plain", activation="relu"),
    "houlsby": Method(bottleneck="plain", activation="silu", position="both"),
    "bitfit": Method(trains="bias"),
    "head": Method(trains="head"),
    "full": Method(trains="all"),
}
