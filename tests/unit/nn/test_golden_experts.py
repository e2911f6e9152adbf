"""The mixture of the published text-generation code: every expert in training, their average in evaluation (float64)."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adakron.nn import BottleneckAdapter, Router
from tests.helpers.shared import shared_golden

EXPERTS = 4


class Always(Router):
    """Draws the same expert for every projection."""

    def __init__(self, expert: int):
        super().__init__(seed=0, sites=1)
        self.drawn = expert
        self.asked: list[tuple[int, int, int]] = []

    def expert(self, site: int, slot: int, num_experts: int) -> int:
        self.asked.append((site, slot, num_experts))
        return self.drawn


@pytest.fixture
def golden() -> dict[str, Tensor]:
    return load_file(shared_golden("nlg_d40_r16_e4.safetensors"))


@pytest.fixture
def adapter(golden: dict[str, Tensor]) -> BottleneckAdapter:
    adapter = BottleneckAdapter(
        40, 16, factor_order="b_major", num_experts=EXPERTS, experts_in=["down_a"], expert_scores="random", dtype=torch.float64
    )
    stacks = {
        kind: torch.stack([golden[f"param.MoA_A.deepspeed_experts.{e}.{kind}"] for e in range(EXPERTS)]) for kind in ("weight", "bias")
    }
    single = {
        f"{own}.{kind}": golden[f"param.{name}.deepspeed_experts.0.{kind}"]
        for name, own in (("MoA_A1", "down_b"), ("MoA_B", "up"))
        for kind in ("weight", "bias")
    }
    scores = golden["param.MoA_A.expert_score_weight"]
    adapter.load_state_dict({"down_a.weight": stacks["weight"], "down_a.bias": stacks["bias"], "down_a.expert_scores": scores, **single})
    return adapter


def worst(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None and got.shape == expected.shape and expected.abs().max() > 0
    return (got - expected).abs().max().item()


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_each_expert_in_training(adapter: BottleneckAdapter, golden: dict[str, Tensor], expert: int) -> None:
    router = Always(expert)
    adapter.router = router
    assert worst(adapter.train()(golden["x"]), golden[f"y_train_expert{expert}"]) <= 1e-12
    assert router.asked == [(0, 0, EXPERTS)]
    others = [golden[f"y_train_expert{other}"] for other in range(EXPERTS) if other != expert]
    assert min(worst(golden[f"y_train_expert{expert}"], other) for other in others) > 1e-3


def test_the_average_and_all_its_gradients(adapter: BottleneckAdapter, golden: dict[str, Tensor]) -> None:
    x = golden["x"].requires_grad_()
    y = adapter.eval()(x)
    y.backward(golden["grad_y"])
    assert worst(y, golden["y_eval"]) <= 1e-12
    assert worst(x.grad, golden["grad_x"]) <= 1e-12
    gradients = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert gradients.keys() == {f"{name}.{kind}" for name in ("down_a", "down_b", "up") for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        stack = gradients[f"down_a.{kind}"]
        assert stack is not None
        for expert in range(EXPERTS):
            assert worst(stack[expert], golden[f"grad.MoA_A.deepspeed_experts.{expert}.{kind}"]) <= 1e-12
        for name, own in (("MoA_A1", "down_b"), ("MoA_B", "up")):
            assert worst(gradients[f"{own}.{kind}"], golden[f"grad.{name}.deepspeed_experts.0.{kind}"]) <= 1e-12


def test_the_shares_are_the_softmax_of_the_scores(adapter: BottleneckAdapter, golden: dict[str, Tensor]) -> None:
    shares = torch.softmax(golden["param.MoA_A.expert_score_weight"], dim=0)
    weight, bias = adapter.down_a.average()  # type: ignore[union-attr, operator]
    for kind, got in (("weight", weight), ("bias", bias)):
        expected = sum(share * golden[f"param.MoA_A.deepspeed_experts.{e}.{kind}"] for e, share in enumerate(shares))
        assert isinstance(expected, Tensor) and worst(got, expected) <= 1e-15
    # Without a gradient to keep, the average is computed once and gives the same.
    with torch.no_grad():
        adapter.eval()
        assert torch.equal(adapter(golden["x"]), adapter(golden["x"]))
        assert worst(adapter(golden["x"]), golden["y_eval"]) <= 1e-12
        adapter.down_a.expert_scores.zero_()  # type: ignore[union-attr, operator]
        assert worst(adapter(golden["x"]), golden["y_eval"]) > 1e-3  # the plain mean would not pass
