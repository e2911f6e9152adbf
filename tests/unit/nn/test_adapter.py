import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adakron.errors import ConfigError
from adakron.nn import ACTIVATIONS, AdaptedLayer, BottleneckAdapter, adapter_parameter_count, layer_width


@pytest.mark.parametrize("kron_factor", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("order", ["a_major", "b_major"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_any_factor_that_divides(kron_factor: int, order: str, activation: str) -> None:
    # The equation with torch.kron and unfused projections, token by token.
    adapter = BottleneckAdapter(10, 12, kron_factor=kron_factor, factor_order=order, activation=activation, dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    expected = torch.empty_like(x)
    for index in [(i, j) for i in range(2) for j in range(3)]:
        a, b = adapter.down_a(x[index]), adapter.down_b(x[index])
        assert a.shape == (kron_factor,) and b.shape == (12 // kron_factor,)
        z = ACTIVATIONS[activation](torch.kron(a, b) if order == "a_major" else torch.kron(b, a))
        expected[index] = x[index] + adapter.up(z)
    torch.testing.assert_close(adapter(x), expected)
    assert sum(p.numel() for p in adapter.parameters()) == adapter_parameter_count(10, 12, kron_factor)


def test_initialisation_is_small_and_owns_its_randomness() -> None:
    state = torch.get_rng_state()
    first = BottleneckAdapter(768, 48, generator=torch.Generator().manual_seed(7))
    again = BottleneckAdapter(768, 48, generator=torch.Generator().manual_seed(7))
    half = BottleneckAdapter(768, 48, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert torch.equal(parameter.bfloat16(), half.get_parameter(name))
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
    x = torch.randn(4, 768)
    change = (first(x) - x).norm() / x.norm()
    assert 0.001 < change < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_is_bit_exact(dtype: torch.dtype) -> None:
    adapter = BottleneckAdapter(32, 16, init="identity", dtype=dtype)
    x = torch.randn(4, 5, 32).to(dtype)
    assert torch.equal(adapter(x), x)
    adapter(x).float().square().sum().backward()
    # The first step can leave the identity: `up` gets a gradient, the factors only once `up` has moved.
    assert adapter.up.weight.grad is not None and adapter.up.weight.grad.any()


def test_sizes_survive_partitioned_weights() -> None:
    adapter = BottleneckAdapter(32, 16)
    layer = AdaptedLayer(nn.Linear(8, 32), adapter)
    for parameter in layer.parameters():
        parameter.data = torch.empty(0)  # what ZeRO stage 3 leaves outside a forward pass
    assert (layer.in_features, layer.out_features, (adapter.down_a.out_features, adapter.down_b.out_features)) == (8, 32, (4, 4))
    assert "bottleneck_dim=4*4" in repr(adapter)


def test_adapted_layer_passes_through_and_can_be_disabled() -> None:
    base = nn.Linear(6, 8)
    layer = AdaptedLayer(base, BottleneckAdapter(8, 4, kron_factor=2))
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.adakron_adapter(base(x)))
    assert not torch.equal(layer(x), base(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))
    assert layer.weight is base.weight and layer.bias is base.bias
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"base_layer", "adakron_adapter"}


def test_layer_width() -> None:
    assert layer_width(nn.Linear(3, 5)) == 5
    assert layer_width(Conv1D(5, 3)) == 5
    with pytest.raises(ConfigError, match="LayerNorm is not a linear layer"):
        layer_width(nn.LayerNorm(4))


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"bottleneck_dim \(50\) must be divisible by kron_factor \(4\); try 48 or 52"):
        BottleneckAdapter(32, 50)
    with pytest.raises(ConfigError, match=r"try 4$"):
        adapter_parameter_count(32, 2)
    with pytest.raises(ConfigError) as caught:
        BottleneckAdapter(0, 8, kron_factor=0, factor_order="up", activation="tanh", init="zero", init_std=-1.0)  # type: ignore[arg-type]
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "hidden_dim", "kron_factor", "factor_order", "activation", "init", "init_std",
    ]  # fmt: skip


def test_published_parameter_counts() -> None:
    assert 12 * adapter_parameter_count(768, 48) == 599_232
    assert 24 * adapter_parameter_count(1024, 16) == 614_592
    assert 24 * adapter_parameter_count(1024, 8) == 368_784
    assert [12 * adapter_parameter_count(768, k) for k in (8, 16, 32, 64)] == [138_312, 230_496, 414_864, 783_600]
