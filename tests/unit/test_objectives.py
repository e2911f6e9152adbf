import math

import pytest
import torch
from torch import Tensor

from adakron.objectives import consistency_sum


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(*shape, generator=generator, requires_grad=True) for _ in range(2))
    return first, second


def test_logits_give_half_of_both_divergences_summed_over_targets() -> None:
    first, second = pair(5, 3)
    expected = sum(0.5 * (kl(p, q) + kl(q, p)) for p, q in zip(first.softmax(-1).tolist(), second.softmax(-1).tolist(), strict=True))
    assert consistency_sum(first, second, "logits").item() == pytest.approx(expected, rel=1e-5)
    assert consistency_sum(first, first, "logits").item() == 0.0


def test_each_side_is_pulled_to_the_other_as_a_constant() -> None:
    # d/dp of 1/2 KL(sg(q) || p) is (p - q) / 2 for each target, and the same the other way round.
    first, second = pair(4, 3)
    consistency_sum(first, second, "logits").backward()
    difference = (first.softmax(-1) - second.softmax(-1)).detach() / 2
    torch.testing.assert_close(first.grad, difference)
    torch.testing.assert_close(second.grad, -difference)


def test_values_give_the_squared_difference() -> None:
    first, second = pair(6, 1)
    loss = consistency_sum(first, second, "values")
    assert loss.item() == pytest.approx((first - second).square().sum().item(), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(first.grad, (first - second).detach())
    torch.testing.assert_close(second.grad, (second - first).detach())


def test_half_precision_is_widened() -> None:
    first, second = (tensor.detach().bfloat16() for tensor in pair(4, 3))
    for kind in ("logits", "values"):
        loss = consistency_sum(first, second, kind)  # type: ignore[arg-type]
        assert loss.dtype == torch.float32 and loss.item() > 0
