"""The Kronecker product of two vectors, for every token at once."""

from typing import Literal

from torch import Tensor

from adakron.errors import ConfigError

FactorOrder = Literal["a_major", "b_major"]


def kronecker_product(a_BTM: Tensor, b_BTN: Tensor, order: FactorOrder = "a_major") -> Tensor:
    """The products of all pairs of entries of a and b, over the last dimension.

    a_BTM: (..., M). b_BTN: (..., N). The leading dimensions are any number of equal (or broadcastable) ones.
    order: whose index is the slow one. "a_major": out[i * N + j] = a[i] * b[j], which is `torch.kron(a, b)` per token;
    "b_major": out[j * M + i] = a[i] * b[j], which is `torch.kron(b, a)`.
    Returns (..., M * N). Raises ConfigError on another order.
    """
    if order == "a_major":
        return (a_BTM.unsqueeze(-1) * b_BTN.unsqueeze(-2)).flatten(-2)
    if order == "b_major":
        return (b_BTN.unsqueeze(-1) * a_BTM.unsqueeze(-2)).flatten(-2)
    raise ConfigError(f"factor_order is {order!r}; it must be a_major or b_major")
