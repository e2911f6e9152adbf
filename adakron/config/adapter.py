"""Settings of what is trained inside the backbone."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from adakron.methods import METHODS, PROJECTIONS, Method
from adakron.settings import Settings, flag, negative_problems, positive_problems


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Settings):
    """What is trained inside the backbone. What is None is the method's own (`adakron.methods`); `resolved` fills it in."""

    method: str = flag(
        "adakron",
        "What trains: adakron; madakron, madakron_partial (its mixtures); adamix, pfeiffer, houlsby (plain bottlenecks); bitfit, head,"
        " full; or a method of PEFT: lora, dora, ia3, lokr, vera, ... The task head always trains.",
    )
    method_config: str | None = flag(None, "PEFT methods: their settings, as a JSON or YAML file or a JSON object. Default: PEFT's own.")
    bottleneck_dim: int = flag(48, "Bottleneck width K, the adapter size of the papers.", "--adapter_size")
    kron_factor: int = flag(4, "Width M of the first factor; the second has N = K / M. Published: 4.")
    factor_order: Literal["a_major", "b_major"] = flag(
        "a_major", "Which factor's index is the slow one in the bottleneck: a_major (published GLUE code), b_major (NLG code)."
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] | None = flag(
        None, "Non-linearity of the bottleneck. Default: erf GELU; pfeiffer relu, houlsby silu."
    )
    num_experts: int | None = flag(None, "Experts E of a mixture. Default: 4 for madakron, madakron_partial and adamix, else 1.")
    experts_in: str | None = flag(
        None,
        "Comma-separated projections with E experts each, the others are shared: of down_a, down_b, up (adamix: down, up). Default:"
        " down_a,down_b; madakron_partial down_a; adamix down.",
    )
    expert_scores: Literal["zeros", "random"] = flag(
        "zeros", "Initial expert scores, whose softmax weighs the average: zeros (the mean) or random in [0, 1) (published NLG code)."
    )
    tune_expert_scores: bool = flag(False, "Train the expert scores; training then uses the average of the experts and draws none.")
    inference_level: Literal[0, 1, 3] = flag(3, "Experts in evaluation: 3 their average, 1 a random one per sentence, 0 per token.")
    adapter_init: Literal["normal", "identity"] = flag(
        "normal", "normal: every weight N(0, init_std), biases 0 (published). identity: up starts at zero, so the adapter does nothing."
    )
    init_std: float = flag(0.02, "Standard deviation of the initial adapter weights.")
    head_modules: str | None = flag(
        None, "Comma-separated names of the modules to train whole, e.g. bert.pooler,classifier. Default: the task head (docs/method.md)."
    )
    position: Literal["ffn", "attention", "both"] | None = flag(
        None, "Adapters behind each layer's feed-forward block, its self-attention, or both. Default: ffn; houlsby both."
    )
    target_modules: str | None = flag(
        None, "Regular expression, matched against whole module names, of the layers to adapt. Default: those of position."
    )
    exclude_modules: str | None = flag(None, "Regular expression, matched against whole module names, of layers not to adapt.")
    layers: str | None = flag(None, "Adapt only layers of these numbers, e.g. 0,3-5. Default: all.")

    @property
    def preset(self) -> Method | None:
        """The method's preset; None for a method of PEFT's."""
        return METHODS.get(self.method)

    @property
    def has_adapters(self) -> bool:
        """Whether bottleneck adapters are put into the backbone."""
        return self.preset is not None and self.preset.trains == "adapters"

    @property
    def bottleneck(self) -> Literal["kronecker", "plain"]:
        """How the method's adapters reach their bottleneck."""
        return self.preset.bottleneck if self.preset else "kronecker"

    @property
    def expert_projections(self) -> tuple[str, ...]:
        """experts_in as names. Of resolved settings: empty with one expert."""
        return tuple(name.strip() for name in (self.experts_in or "").split(",") if name.strip())

    @property
    def idle(self) -> tuple[str, ...]:
        """Names of the settings that mean nothing to the method. A recipe for several methods may hold them."""
        kronecker = ("kron_factor", "factor_order")
        if self.has_adapters:
            return () if self.bottleneck == "kronecker" else kronecker
        return ("bottleneck_dim", *kronecker, "activation", "adapter_init", "init_std")

    def resolved(self) -> "AdapterConfig":
        """The same settings with the method's own in place of None."""
        preset = self.preset
        if preset is None or preset.trains != "adapters":
            return self
        experts = preset.num_experts if self.num_experts is None else self.num_experts
        experts_in = ",".join(preset.experts_in) if self.experts_in is None else self.experts_in
        return dataclasses.replace(
            self,
            activation=self.activation or preset.activation,
            position=None if self.target_modules is not None else self.position or preset.position,
            num_experts=experts,
            experts_in=experts_in if experts > 1 else "",
        )

    def problems(self) -> list[str]:
        found = positive_problems(self, "bottleneck_dim", "kron_factor", "num_experts") + negative_problems(self, "init_std")
        if not found and self.has_adapters and self.bottleneck == "kronecker" and self.bottleneck_dim % self.kron_factor:
            below = self.bottleneck_dim - self.bottleneck_dim % self.kron_factor
            near = " or ".join(str(k) for k in (below, below + self.kron_factor) if k)
            found.append(
                f"bottleneck_dim ({self.bottleneck_dim}) must be divisible by kron_factor ({self.kron_factor}); try --bottleneck_dim {near}"
            )
        if not re.fullmatch(r"[a-z0-9_]+", self.method):
            found.append(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}, or the name of a PEFT method (set --method)")
        elif self.preset is not None and self.method_config is not None:
            found.append(f"method_config belongs to methods of PEFT's, and {self.method} is ours; drop --method_config")
        if self.target_modules is not None and self.position is not None:
            found.append("target_modules names the layers itself, so position says nothing; drop --position or --target_modules")
        return found or self._placement_problems() + self._expert_problems()

    def _placement_problems(self) -> list[str]:
        if self.has_adapters:
            return []
        names = ("position", "target_modules", "exclude_modules", "layers")
        remedy = "give PEFT's own in --method_config" if self.preset is None else "choose a method with adapters"
        return [
            f"{name} places adapters, and method {self.method} has none of ours; drop --{name}, or {remedy}"
            for name in names
            if getattr(self, name) is not None
        ]

    def _expert_problems(self) -> list[str]:
        """Settings of mixtures that would do nothing, or name what is not there."""
        preset = self.preset
        experts = (preset.num_experts if preset else 1) if self.num_experts is None else self.num_experts
        if experts > 1:
            if not self.has_adapters:
                return [f"num_experts is {experts}, but method {self.method} has no adapters; use --method madakron, or drop --num_experts"]
            known = PROJECTIONS[self.bottleneck]
            names = self.expert_projections if self.experts_in is not None or preset is None else preset.experts_in
            unknown = [name for name in names if name not in known]
            if unknown:
                return [f"experts_in names {', '.join(unknown)}; {self.method} has {', '.join(known)} (set --experts_in)"]
            if len(set(names)) < len(names):
                once = ",".join(dict.fromkeys(names))
                return [f"experts_in is {','.join(names)}; it must name a projection once (set --experts_in {once})"]
            if not names:
                return [f"num_experts is {experts}, but no projection has experts; name some of {', '.join(known)} (set --experts_in)"]
            return []
        return [
            f"{name} is {getattr(self, name)}, but there is one expert, so it would do nothing; set --num_experts above 1, or drop --{name}"
            for name, default in (
                ("experts_in", None),
                ("expert_scores", "zeros"),
                ("tune_expert_scores", False),
                ("inference_level", 3),
            )
            if getattr(self, name) not in (default, "" if name == "experts_in" else default)
        ]
