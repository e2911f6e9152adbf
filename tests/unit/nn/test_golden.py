"""Output and every gradient equal those of the published implementation (float64 tensors it produced)."""

import pytest
import torch
from safetensors.torch import load_file

from adakron.nn import BottleneckAdapter
from tests.helpers.shared import shared_golden

NLU = {"MoA_A2": "down_a", "MoA_A1": "down_b", "MoA_B": "up"}
NLG = {"MoA_A": "down_a", "MoA_A1": "down_b", "MoA_B": "up"}


@pytest.mark.parametrize(
    ("file", "names", "order"),
    [
        ("nlu_d32_r16.safetensors", NLU, "a_major"),
        ("nlu_d48_r48.safetensors", NLU, "a_major"),
        ("nlg_d32_r8_e1.safetensors", NLG, "b_major"),
    ],
)
def test_equals_the_published_code(file: str, names: dict[str, str], order: str) -> None:
    golden = load_file(shared_golden(file))
    ours = {f"{name}.deepspeed_experts.0.{kind}": f"{layer}.{kind}" for name, layer in names.items() for kind in ("weight", "bias")}
    hidden_dim, bottleneck_dim = golden["param.MoA_B.deepspeed_experts.0.weight"].shape
    adapter = BottleneckAdapter(hidden_dim, bottleneck_dim, factor_order=order, dtype=torch.float64)  # type: ignore[arg-type]
    adapter.load_state_dict({own: golden[f"param.{name}"] for name, own in ours.items()})

    x = golden["x"].requires_grad_()
    y = adapter(x)
    y.backward(golden["grad_y"])

    def worst(got: torch.Tensor | None, expected: torch.Tensor) -> float:
        assert got is not None and got.shape == expected.shape and expected.abs().max() > 0
        return (got - expected).abs().max().item()

    assert worst(y, golden["y_eval"]) <= 1e-12
    assert worst(x.grad, golden["grad_x"]) <= 1e-12
    parameters = dict(adapter.named_parameters())
    assert parameters.keys() == set(ours.values())
    for name, own in ours.items():
        assert worst(parameters[own].grad, golden[f"grad.{name}"]) <= 1e-12, own


def test_the_other_order_would_not_pass() -> None:
    golden = load_file(shared_golden("nlu_d32_r16.safetensors"))
    adapter = BottleneckAdapter(32, 16, factor_order="b_major", dtype=torch.float64)
    for name, layer in NLU.items():
        for kind in ("weight", "bias"):
            getattr(adapter.get_submodule(layer), kind).data = golden[f"param.{name}.deepspeed_experts.0.{kind}"]
    assert (adapter(golden["x"]) - golden["y_eval"]).abs().max() > 1e-3
