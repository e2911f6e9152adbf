"""The bottleneck adapter (AdaKron, its mixtures and its relatives) and the wrapper that puts it behind a frozen linear layer.

Tensor-name suffixes: B batch, T tokens, D hidden, M and N the widths of the two factors, K = M * N the bottleneck.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakron.errors import ConfigError
from adakron.methods import PROJECTIONS
from adakron.nn.kronecker import FactorOrder, kronecker_product
from adakron.nn.projection import Projection, ScoreInit
from adakron.nn.routing import Router

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

Bottleneck = Literal["kronecker", "plain"]


class BottleneckAdapter(nn.Module):
    """y = x + up(activation(z)), with a bottleneck z of width K that is a Kronecker product or a projection of x.

    hidden_dim: width D of the input and the output.
    bottleneck_dim: width K of the bottleneck.
    bottleneck: "kronecker": z = down_a(x) (x) down_b(x) (AdaKron); "plain": z = down(x) (Houlsby, Pfeiffer, AdaMix).
    kron_factor: width M of the first factor; the second has N = K / M.
    factor_order: order of the products, see `kronecker_product`.
    activation: a key of `ACTIVATIONS`; "gelu" is the exact (erf) one.
    init: "normal": every weight N(0, init_std), every bias 0. "identity": the weights of `up` are 0 too, so y = x, bit for bit.
    num_experts, experts_in: E experts in each of the named projections, one in the others; see `Projection`.
    expert_scores, tune_expert_scores: their shares in the average, see `Projection`.
    inference_level: what evaluation uses of several experts: 3 their average, 1 a random one per sentence, 0 per token.
    generator: what the initial values are drawn from, on the CPU. Default: the global generator.

    In training every projection with experts uses one of them in a forward pass, as `router` (a plain attribute) draws it;
    without a router, from PyTorch's global generator on the CPU, as dropout does. Where scores train, the average is used.

    Projections: down_a (D -> M) and down_b (D -> N), or down (D -> K); up (K -> D); each with a bias.
    Sizes are kept as integers and never read from a weight, which ZeRO stage 3 replaces by an empty tensor.
    Raises ConfigError, naming every wrong argument.
    """

    def __init__(
        self,
        hidden_dim: int,
        bottleneck_dim: int,
        *,
        bottleneck: Bottleneck = "kronecker",
        kron_factor: int = 4,
        factor_order: FactorOrder = "a_major",
        activation: str = "gelu",
        init: Literal["normal", "identity"] = "normal",
        init_std: float = 0.02,
        num_experts: int = 1,
        experts_in: Sequence[str] = (),
        expert_scores: ScoreInit = "zeros",
        tune_expert_scores: bool = False,
        inference_level: Literal[0, 1, 3] = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        problems = _size_problems(hidden_dim, bottleneck_dim, kron_factor if bottleneck == "kronecker" else 1)
        for name, value, choices in (
            ("bottleneck", bottleneck, tuple(PROJECTIONS)),
            ("factor_order", factor_order, ("a_major", "b_major")),
            ("activation", activation, tuple(ACTIVATIONS)),
            ("init", init, ("normal", "identity")),
            ("expert_scores", expert_scores, ("zeros", "random")),
            ("inference_level", inference_level, (0, 1, 3)),
        ):
            if value not in choices:
                problems.append(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
        if not 0.0 <= init_std < float("inf"):
            problems.append(f"init_std is {init_std}; it must be a finite number, at least 0")
        if not problems:
            problems = _expert_problems(bottleneck, num_experts, experts_in)
        if problems:
            raise ConfigError(problems)
        self.hidden_dim, self.bottleneck_dim, self.bottleneck, self.kron_factor = hidden_dim, bottleneck_dim, bottleneck, kron_factor
        self.factor_order, self.activation, self.init, self.init_std = factor_order, activation, init, init_std
        self.num_experts, self.experts_in, self.inference_level = num_experts, tuple(experts_in), inference_level
        self.router: Router | None = None
        self.site = 0
        for name, (inputs, outputs) in projection_sizes(hidden_dim, bottleneck_dim, bottleneck, kron_factor).items():
            self.add_module(
                name,
                Projection(
                    inputs,
                    outputs,
                    num_experts=num_experts if name in experts_in else 1,
                    scores=expert_scores,
                    tune_scores=tune_expert_scores,
                    device=device,
                    dtype=dtype,
                ),
            )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new initial values from a generator on the CPU (default: the global one)."""
        for name in PROJECTIONS[self.bottleneck]:
            self._projection(name).reset_parameters(self.init_std, generator)
        if self.init == "identity":
            self._projection("up").weight.zero_()

    def _projection(self, name: str) -> Projection:
        projection = getattr(self, name)
        assert isinstance(projection, Projection)
        return projection

    def _weights(self, slot: int, name: str) -> tuple[Tensor, Tensor]:
        """Weight (outputs, inputs) and bias (outputs,) that a projection uses for all of this forward pass."""
        projection = self._projection(name)
        if projection.num_experts == 1 or not self.training or projection.tunes_scores:
            return projection.average()
        if self.router is None:
            # On the CPU, where reading the number waits for nothing; checkpointing restores this generator as it does for dropout.
            return projection.expert(int(torch.randint(projection.num_experts, ())))
        return projection.expert(self.router.expert(self.site, slot, projection.num_experts))

    def _chooses_by_input(self, name: str) -> bool:
        return not self.training and self.inference_level != 3 and self._projection(name).num_experts > 1

    def _apply_chosen(self, slot: int, name: str, x_BTI: Tensor) -> Tensor:
        """A projection in evaluation with a random expert per token or per sentence."""
        by_sentence = self.inference_level == 1
        if by_sentence and x_BTI.dim() < 3:
            raise ConfigError(
                f"inference_level 1 draws an expert per sentence, but this model's layers see tokens without sentences, shape"
                f" {tuple(x_BTI.shape)}; use --inference_level 3 or 0"
            )
        shape = (x_BTI.shape[0], *(1 for _ in x_BTI.shape[1:-1])) if by_sentence else x_BTI.shape[:-1]
        projection = self._projection(name)
        generator = None
        if self.router is not None:
            generator = self.router.generator(self.site, slot, x_BTI.device, per_call=not by_sentence)
        experts = torch.randint(projection.num_experts, shape, generator=generator, device=x_BTI.device)
        return projection.chosen(x_BTI, experts.expand(x_BTI.shape[:-1]))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        downs = PROJECTIONS[self.bottleneck][:-1]
        if any(self._chooses_by_input(name) for name in downs):
            parts = [
                self._apply_chosen(slot, name, x_BTD) if self._chooses_by_input(name) else F.linear(x_BTD, *self._weights(slot, name))
                for slot, name in enumerate(downs)
            ]
        elif len(downs) == 1:
            parts = [F.linear(x_BTD, *self._weights(0, downs[0]))]
        else:
            # One product with the stacked weights reads the activations once; the weights are small beside them.
            weights, biases = zip(*(self._weights(slot, name) for slot, name in enumerate(downs)), strict=True)
            down = F.linear(x_BTD, torch.cat(weights), torch.cat(biases))
            parts = list(down.split([self._projection(name).out_features for name in downs], dim=-1))
        z_BTK = ACTIVATIONS[self.activation](parts[0] if len(parts) == 1 else kronecker_product(parts[0], parts[1], self.factor_order))
        slot = len(downs)
        if self._chooses_by_input("up"):
            return x_BTD + self._apply_chosen(slot, "up", z_BTK)
        return x_BTD + F.linear(z_BTK, *self._weights(slot, "up"))

    def extra_repr(self) -> str:
        """Sizes and choices, for `print(model)`."""
        width = f"{self.kron_factor}*{self.bottleneck_dim // self.kron_factor}, {self.factor_order}"
        if self.bottleneck == "plain":
            width = str(self.bottleneck_dim)
        return f"hidden_dim={self.hidden_dim}, bottleneck_dim={width}, {self.activation}, init={self.init}"


class AdaptedLayer(nn.Module):
    """A linear layer followed by an adapter, in the place of the layer.

    base_layer: anything with a width (`layer_width`): nn.Linear, the Conv1D of transformers' GPT-2, their quantised kin.
    adapter: an adapter of that width.
    `enabled` (a plain attribute): False returns the output of base_layer untouched.
    """

    def __init__(self, base_layer: nn.Module, adapter: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.adakron_adapter = adapter
        self.enabled = True

    def forward(self, x_BTF: Tensor) -> Tensor:
        """(..., inputs of the layer) -> (..., outputs of the layer)."""
        hidden_BTD = self.base_layer(x_BTF)
        return self.adakron_adapter(hidden_BTD) if self.enabled else hidden_BTD

    # Model code looks at its layers' weights and sizes, e.g. `layer.weight.dtype`; it finds those of the wrapped layer.
    @property
    def weight(self) -> Any:
        """Weight of base_layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """Bias of base_layer."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Input width of base_layer."""
        return layer_sizes(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        """Output width of base_layer."""
        return layer_sizes(self.base_layer)[1]


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """(input width, output width) of a linear layer, from its attributes; ConfigError where the module is none.

    nn.Linear and its quantised kin say in_features and out_features, Conv1D says nx and nf. The weight is not asked: its
    shape is (0,) under ZeRO stage 3 and packed when quantised.
    """
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        sizes = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    raise ConfigError(f"{type(module).__name__} is not a linear layer: it has neither in_features/out_features nor nx/nf")


def layer_width(module: nn.Module) -> int:
    """Output width of a linear layer; ConfigError where the module is none."""
    return layer_sizes(module)[1]


def projection_sizes(hidden_dim: int, bottleneck_dim: int, bottleneck: Bottleneck, kron_factor: int = 4) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of an adapter's projections, by name and in order."""
    if bottleneck == "plain":
        downs = {"down": (hidden_dim, bottleneck_dim)}
    else:
        downs = {"down_a": (hidden_dim, kron_factor), "down_b": (hidden_dim, bottleneck_dim // kron_factor)}
    return {**downs, "up": (bottleneck_dim, hidden_dim)}


def adapter_parameter_count(
    hidden_dim: int,
    bottleneck_dim: int,
    kron_factor: int = 4,
    *,
    bottleneck: Bottleneck = "kronecker",
    num_experts: int = 1,
    experts_in: Sequence[str] = (),
    tune_expert_scores: bool = False,
) -> int:
    """Trainable numbers of one adapter: (inputs + 1) x outputs of every projection, times E where it has experts.

    With one expert, (D + 1) M + (D + 1) N + (K + 1) D for a Kronecker bottleneck and (D + 1) K + (K + 1) D for a plain one.
    Scores add E to each projection with experts where they train. ConfigError on sizes that do not fit.
    """
    problems = _size_problems(hidden_dim, bottleneck_dim, kron_factor if bottleneck == "kronecker" else 1)
    problems = problems or _expert_problems(bottleneck, num_experts, experts_in)
    if problems:
        raise ConfigError(problems)
    count = 0
    for name, (inputs, outputs) in projection_sizes(hidden_dim, bottleneck_dim, bottleneck, kron_factor).items():
        experts = num_experts if name in experts_in else 1
        count += experts * (inputs + 1) * outputs + (experts if tune_expert_scores and experts > 1 else 0)
    return count


def _size_problems(hidden_dim: int, bottleneck_dim: int, kron_factor: int) -> list[str]:
    sizes = {"hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim, "kron_factor": kron_factor}
    problems = [f"{name} is {size}; it must be at least 1" for name, size in sizes.items() if size < 1]
    if not problems and bottleneck_dim % kron_factor:
        below = bottleneck_dim - bottleneck_dim % kron_factor
        near = " or ".join(str(k) for k in (below, below + kron_factor) if k)
        problems.append(f"bottleneck_dim ({bottleneck_dim}) must be divisible by kron_factor ({kron_factor}); try {near}")
    return problems


def _expert_problems(bottleneck: Bottleneck, num_experts: int, experts_in: Sequence[str]) -> list[str]:
    names = PROJECTIONS[bottleneck]
    unknown = [name for name in experts_in if name not in names]
    if num_experts < 1:
        return [f"num_experts is {num_experts}; it must be at least 1"]
    if unknown:
        return [f"experts_in names {', '.join(unknown)}; a {bottleneck} bottleneck has {', '.join(names)}"]
    if len(set(experts_in)) < len(experts_in):
        return [f"experts_in is {', '.join(experts_in)}; it must name a projection once"]
    if num_experts > 1 and not experts_in:
        return [f"num_experts is {num_experts}, but experts_in names no projection; choose among {', '.join(names)}"]
    return []
