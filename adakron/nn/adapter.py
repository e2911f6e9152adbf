"""The AdaKron adapter and the wrapper that puts it behind a frozen linear layer.

Tensor-name suffixes: B batch, T tokens, D hidden, M and N the widths of the two factors, K = M * N the bottleneck.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakron.errors import ConfigError
from adakron.nn.kronecker import FactorOrder, kronecker_product

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class KroneckerAdapter(nn.Module):
    """y = x + up(activation(down_a(x) (x) down_b(x))), a bottleneck of width K = M * N reached by two small projections.

    hidden_dim: width D of the input and the output.
    bottleneck_dim: width K of the bottleneck, a multiple of kron_factor.
    kron_factor: width M of the first factor; the second has N = K / M.
    factor_order: order of the products, see `kronecker_product`.
    activation: a key of `ACTIVATIONS`; "gelu" is the exact (erf) one.
    init: "normal": every weight N(0, init_std), every bias 0. "identity": the weights of `up` are 0 too, so y = x, bit for bit.
    generator: what the initial values are drawn from, on the CPU. Default: the global generator.

    The submodules are ordinary linear layers: down_a (D -> M), down_b (D -> N), up (K -> D), each with a bias.
    Sizes are kept as integers and never read from a weight, which ZeRO stage 3 replaces by an empty tensor.
    Raises ConfigError, naming every wrong argument.
    """

    def __init__(
        self,
        hidden_dim: int,
        bottleneck_dim: int,
        *,
        kron_factor: int = 4,
        factor_order: FactorOrder = "a_major",
        activation: str = "gelu",
        init: Literal["normal", "identity"] = "normal",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        problems = _size_problems(hidden_dim, bottleneck_dim, kron_factor)
        for name, value, choices in (
            ("factor_order", factor_order, ("a_major", "b_major")),
            ("activation", activation, tuple(ACTIVATIONS)),
            ("init", init, ("normal", "identity")),
        ):
            if value not in choices:
                problems.append(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        if not 0.0 <= init_std < float("inf"):
            problems.append(f"init_std is {init_std}; it must be a finite number, at least 0")
        if problems:
            raise ConfigError(problems)
        self.hidden_dim, self.bottleneck_dim, self.kron_factor = hidden_dim, bottleneck_dim, kron_factor
        self.factor_order, self.activation, self.init, self.init_std = factor_order, activation, init, init_std
        self.factor_widths = (kron_factor, bottleneck_dim // kron_factor)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            # nn.Linear would draw weights that are overwritten at once, and so move the global random state.
            where = torch.get_default_device() if device is None else device
            return nn.utils.skip_init(nn.Linear, inputs, outputs, device=where, dtype=dtype or torch.get_default_dtype())

        self.down_a = linear(hidden_dim, self.factor_widths[0])
        self.down_b = linear(hidden_dim, self.factor_widths[1])
        self.up = linear(bottleneck_dim, hidden_dim)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new initial values from a generator on the CPU (default: the global one).

        Values are drawn in float32 on the CPU, so they are the same for every device and differ between dtypes only by rounding.
        """
        for layer in (self.down_a, self.down_b, self.up):
            weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.float32, device="cpu")
            layer.weight.copy_(weight.normal_(0.0, self.init_std, generator=generator))
            layer.bias.zero_()
        if self.init == "identity":
            self.up.weight.zero_()

    def projection(self, name: Literal["down_a", "down_b", "up"]) -> tuple[Tensor, Tensor]:
        """Weight (outputs, inputs) and bias (outputs,) that the named projection uses in this forward pass."""
        layer = getattr(self, name)
        return layer.weight, layer.bias

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weight_a, bias_a = self.projection("down_a")
        weight_b, bias_b = self.projection("down_b")
        # One product with the stacked weights reads the activations once; the weights are small beside them.
        down = F.linear(x_BTD, torch.cat((weight_a, weight_b)), torch.cat((bias_a, bias_b)))
        a_BTM, b_BTN = down.split(self.factor_widths, dim=-1)
        z_BTK = ACTIVATIONS[self.activation](kronecker_product(a_BTM, b_BTN, self.factor_order))
        return x_BTD + F.linear(z_BTK, *self.projection("up"))

    def extra_repr(self) -> str:
        """Sizes and choices, for `print(model)`."""
        m, n = self.factor_widths
        return f"hidden_dim={self.hidden_dim}, bottleneck_dim={m}*{n}, {self.factor_order}, {self.activation}, init={self.init}"


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


def adapter_parameter_count(hidden_dim: int, bottleneck_dim: int, kron_factor: int = 4) -> int:
    """Weights and biases of one adapter: (D + 1) M + (D + 1) N + (K + 1) D. ConfigError on sizes that do not fit."""
    problems = _size_problems(hidden_dim, bottleneck_dim, kron_factor)
    if problems:
        raise ConfigError(problems)
    return (hidden_dim + 1) * (kron_factor + bottleneck_dim // kron_factor) + (bottleneck_dim + 1) * hidden_dim


def _size_problems(hidden_dim: int, bottleneck_dim: int, kron_factor: int) -> list[str]:
    sizes = {"hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim, "kron_factor": kron_factor}
    problems = [f"{name} is {size}; it must be at least 1" for name, size in sizes.items() if size < 1]
    if not problems and bottleneck_dim % kron_factor:
        below = bottleneck_dim - bottleneck_dim % kron_factor
        near = " or ".join(str(k) for k in (below, below + kron_factor) if k)
        problems.append(f"bottleneck_dim ({bottleneck_dim}) must be divisible by kron_factor ({kron_factor}); try {near}")
    return problems
