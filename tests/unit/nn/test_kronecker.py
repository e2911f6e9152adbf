import pytest
import torch

from adakron.errors import ConfigError
from adakron.nn import kronecker_product


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_equals_torch_kron_token_by_token(leading: tuple[int, ...]) -> None:
    a, b = torch.randn(*leading, 3), torch.randn(*leading, 4)
    a_major, b_major = kronecker_product(a, b, "a_major"), kronecker_product(a, b, "b_major")
    assert a_major.shape == b_major.shape == (*leading, 12)
    tokens = zip(a.reshape(-1, 3), b.reshape(-1, 4), a_major.reshape(-1, 12), b_major.reshape(-1, 12), strict=True)
    for a_M, b_N, out_a, out_b in tokens:
        assert torch.equal(out_a, torch.kron(a_M, b_N))
        assert torch.equal(out_b, torch.kron(b_N, a_M))


def test_index_formulas() -> None:
    a, b = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0, 11.0])
    assert kronecker_product(a, b, "a_major").tolist() == [10, 14, 22, 15, 21, 33]
    assert kronecker_product(a, b, "b_major").tolist() == [10, 15, 14, 21, 22, 33]


def test_gradients() -> None:
    a = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for order in ("a_major", "b_major"):
        assert torch.autograd.gradcheck(lambda x, y, order=order: kronecker_product(x, y, order), (a, b))


def test_unknown_order() -> None:
    with pytest.raises(ConfigError, match="'c_major'; it must be a_major or b_major"):
        kronecker_product(torch.ones(2), torch.ones(2), "c_major")  # type: ignore[arg-type]
