import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adakron import objectives
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_in_pieces_is_torchs(dtype: torch.dtype, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_NUMBERS_AT_ONCE", 3 * 11)  # three of seven rows at once
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 11, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(11, (7,), generator=generator)
    found = objectives.cross_entropy_sum(logits, targets, smoothing)
    (2.5 * found).backward()
    gradient, logits.grad = logits.grad, None
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    expected = F.cross_entropy(wide, targets, reduction="sum", label_smoothing=smoothing)
    (2.5 * expected).backward()
    assert found.dtype == expected.dtype
    assert gradient is not None and gradient.dtype == dtype
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, logits.grad)
    if not smoothing:
        torch.testing.assert_close(objectives.token_losses(logits, targets).sum(), expected)


def test_cross_entropy_holds_no_second_tensor_of_the_logits_size() -> None:
    logits = torch.zeros(4, 6, dtype=torch.bfloat16, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        objectives.cross_entropy_sum(logits, torch.tensor([0, 1, 2, 3]))
    assert [tuple(tensor.shape) for tensor in saved if tensor.numel() >= logits.numel()] == [(4, 6)]
    assert next(tensor for tensor in saved if tensor.shape == logits.shape).data_ptr() == logits.data_ptr()
