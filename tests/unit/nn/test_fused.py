"""The compiled kernels compute what torch does, forward and backward."""

import pytest
import torch
from torch import Tensor, nn

from adakron.nn import DropoutMasks, counters, fused, native

P = 0.3
HEADS, DEPTH = 3, 8  # a head's columns are no whole vector


@pytest.fixture(autouse=True)
def kernels():
    problem = native.load()
    if problem is not None:
        pytest.skip(problem)
    yield
    native.unload()


def noise(keys: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    if not columns:
        return torch.empty(*keys.shape, 0)
    limit = counters.threshold(P)
    return counters.at_least(keys, limit, torch.empty(*keys.shape, columns, dtype=dtype)).mul_(1.0 / counters.share_kept(limit))


def keys(*shape: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, shape)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("dtype", list(native.TYPES))
@pytest.mark.parametrize("width", [1, 37, 384])
def test_dropout_is_torchs_bit_for_bit(dtype, width):
    torch.manual_seed(0)
    x, row_keys = torch.randn(5, 3, width).to(dtype), keys(5, 3)
    masks = DropoutMasks(0)

    def dropped() -> tuple[Tensor, Tensor]:
        masks._row_keys = lambda x, shared: row_keys
        y = x.clone().requires_grad_()
        out = masks.dropped(y, P)
        return out, torch.autograd.grad(out, y, x)[0]

    found = dropped()
    native.unload()
    assert all(torch.equal(a, b) for a, b in zip(found, dropped(), strict=True))
    assert 0 < (found[0] == 0).sum() < x.numel() or width == 1


@pytest.mark.parametrize("dtype", list(native.TYPES))
@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("width", [5, 100])
def test_add_norm(dtype, drops, width):
    torch.manual_seed(1)
    norm = nn.LayerNorm(width).to(dtype).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    x, residual = (torch.randn(9, width).to(dtype).requires_grad_() for _ in range(2))
    gradient, row_keys = torch.randn(9, width).to(dtype), keys(9)
    out = fused.add_norm(x, residual, norm.weight, norm.bias, norm.eps, fused.Noise(row_keys, P) if drops else None)
    expected = norm((x * noise(row_keys, width, dtype) if drops else x) + residual)
    assert_near(out, expected, dtype)
    for found, wanted in zip(
        torch.autograd.grad(out, (x, residual), gradient), torch.autograd.grad(expected, (x, residual), gradient), strict=True
    ):
        assert_near(found, wanted, dtype)


def written_out(parts: Tensor, lengths: list[int], weights_noise: list[Tensor], firsts: bool) -> Tensor:
    """In float64. parts: (N, 3 * HEADS * DEPTH)."""
    out, begin = [], 0
    for length, dropped in zip(lengths, weights_noise, strict=True):
        q, k, v = (x.unflatten(-1, (HEADS, DEPTH)).transpose(0, 1) for x in parts[begin : begin + length].chunk(3, -1))
        weights = ((q[:, :1] if firsts else q) @ k.transpose(1, 2) * DEPTH**-0.5).softmax(-1)
        out.append(((weights * dropped[:, : weights.shape[1]]) @ v).transpose(0, 1).flatten(1))
        begin += length
    return torch.cat(out)


@pytest.mark.parametrize("dtype", list(native.TYPES))
@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize(("firsts", "split"), [(False, 1), (False, 2), (False, 3), (True, 2), (True, 3)])
def test_attention(dtype, drops, firsts, split):
    torch.manual_seed(2)
    lengths, behind = [1, 70, 4, 16, 0, 17], 3
    texts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    whole = (2 * torch.randn(sum(lengths) + behind, 3 * HEADS * DEPTH)).to(dtype)
    lengths_of_queries = [min(1, one) for one in lengths] if firsts else lengths
    queries = texts if not firsts else torch.tensor([0, *torch.tensor(lengths_of_queries).cumsum(0)])
    text_keys = keys(len(lengths))
    dropped = [
        noise(counters.mixed_tensor(counters.mixed_tensor(key, HEADS), length), length, dtype).double() if drops else torch.ones(1, 1, 1)
        for key, length in zip(text_keys, lengths, strict=True)
    ]

    reference = whole.double().requires_grad_()
    expected = written_out(reference, lengths, dropped, firsts)
    begins = [int(texts[i]) for i, length in enumerate(lengths) if length]

    leaf = whole.clone().requires_grad_()
    q, k, v = leaf.chunk(3, -1)
    q = q[begins] if firsts else q
    parts = {1: (leaf,), 2: (q, torch.cat([k, v], -1)), 3: (q, k, v)}[split]
    made = fused.Noise(text_keys, P) if drops else None
    out = fused.attention(parts, fused.Texts(queries, texts, max(lengths)), HEADS, DEPTH**-0.5, made)
    assert torch.equal(out[len(expected) :], torch.zeros_like(out[len(expected) :])), "behind the last text"
    assert_near(out[: len(expected)], expected, dtype)

    gradient = torch.randn_like(expected).to(dtype)
    (found,) = torch.autograd.grad(out[: len(expected)], leaf, gradient)
    (wanted,) = torch.autograd.grad(expected, reference, gradient.double())
    assert_near(found, wanted, dtype)


@pytest.mark.parametrize("dtype", list(native.TYPES))
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    texts, text_keys = torch.tensor([0, 30, 35, 80]), keys(3)
    parts = torch.randn(80, 3 * HEADS * DEPTH).to(dtype).requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = fused.attention(
                (parts,), fused.Texts(texts, texts, int(texts.diff().max())), HEADS, DEPTH**-0.5, fused.Noise(text_keys, P)
            )
            results.append((out, *torch.autograd.grad(out.sum(), parts)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_finite_stays_so_and_in_its_text():
    texts = torch.tensor([0, 20, 40])
    parts = torch.randn(40, 3 * HEADS * DEPTH)
    parts[3, 5] = torch.nan
    parts.requires_grad_()
    out = fused.attention((parts,), fused.Texts(texts, texts, int(texts.diff().max())), HEADS, DEPTH**-0.5, None)
    (gradient,) = torch.autograd.grad(out.sum(), parts)
    for found in (out, gradient):
        assert found[:20].isnan().any() and found[20:].isfinite().all()


def test_keys_of_a_row_are_those_of_its_rectangle():
    masks, places = DropoutMasks(7), torch.tensor([0, 1, 5, 6, 9])
    masks.training_pass(3, 0, torch.arange(3).numpy())
    with masks.running(3, 5):
        rectangle = masks._row_keys(torch.empty(3, 5, 2), shared=False)
    masks.places = places
    with masks.running(3, 5):
        assert torch.equal(masks.token_keys(), rectangle.flatten()[places])
