"""Masks as a function of counters: their statistics, and what they depend on."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adakron.errors import ConfigError
from adakron.nn import DropoutMasks, TableDropout, counters

ROWS, WIDTH = 2048, 512


def kept(p, *, seed=1, step=0, index=0, examples=None, call=0, shape=(WIDTH,)):
    """Whether each element is kept, as +-1 scaled to mean 0 and variance 1: (rows, *shape)."""
    masks = DropoutMasks(seed)
    rows = np.arange(ROWS) if examples is None else np.asarray(examples)
    masks.training_pass(step, index, rows)
    with masks.running(len(rows), 1):
        for _ in range(call + 1):
            noise = masks.noise(torch.empty(len(rows), *shape), p)
    return ((noise > 0).double() - (1 - p)) / math.sqrt(p * (1 - p))


def assert_uncorrelated(first, second):
    assert abs(float((first * second).sum())) < 4 * math.sqrt(first.numel())


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(p):
    z = kept(p)
    assert abs(float(z.sum())) < 4 * math.sqrt(z.numel())
    # Of each column and of each row as well, as far as chance goes.
    for axis in (0, 1):
        chi_square = float((z.sum(axis) ** 2 / z.shape[axis]).sum())
        count = z.shape[1 - axis]
        assert abs(chi_square - count) < 5 * math.sqrt(2 * count)
    masks = DropoutMasks(1)
    masks.training_pass(0, 0, np.arange(ROWS))
    with masks.running(ROWS, 1):
        mean = float(masks.dropped(torch.ones(ROWS, WIDTH), p).mean())
    assert mean == pytest.approx(1.0, abs=5 * math.sqrt(p / (1 - p) / z.numel()))


def test_draws_are_uniform_in_every_lane():
    draws = counters.draws(torch.from_numpy(counters.mixed_array(3, np.arange(ROWS))), WIDTH).to(torch.int64) + 2**15
    for lane in range(counters.DRAWS_PER_WORD):
        values = draws[:, lane :: counters.DRAWS_PER_WORD].flatten()
        for part in (values >> 8, values & 255):
            expected = part.numel() / 256
            chi_square = float(((torch.bincount(part, minlength=256) - expected) ** 2 / expected).sum())
            assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_one_bit_of_a_key_changes_half_of_every_draw():
    keys = torch.from_numpy(counters.mixed_array(3, np.arange(ROWS)))
    draws = counters.draws(keys, 64).to(torch.int64)
    for bit in range(64):
        changed = (draws ^ counters.draws(keys ^ counters.signed(1 << bit), 64).to(torch.int64)) & 0xFFFF
        for place in range(16):
            flips = ((changed >> place) & 1).double().reshape(ROWS, 16, 4).mean((0, 1))
            assert (flips - 0.5).abs().max() < 0.5 * 6 / math.sqrt(16 * ROWS), (bit, place)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_different_counters_are_independent(p):
    base = kept(p)
    others = [kept(p, seed=2), kept(p, step=1), kept(p, index=1), kept(p, examples=np.arange(ROWS) + ROWS), kept(p, call=1)]
    for number, other in enumerate(others):
        assert_uncorrelated(base, other)
        assert_uncorrelated(other, others[number - 1])
    for shift in (1, 2, 3, 4, 5, 8, 64, 256):
        assert_uncorrelated(base[:, shift:], base[:, :-shift])
        assert_uncorrelated(base[shift:], base[:-shift])
        # Two columns of one row and the same two of another: what a sum of a row's and a column's key would leave equal.
        corners = base[shift:, shift:] * base[shift:, :-shift] * base[:-shift, shift:]
        assert_uncorrelated(corners, base[:-shift, :-shift])
    heads = kept(p, examples=np.arange(64), shape=(4, 32, 32))
    assert_uncorrelated(heads[:, 1:], heads[:, :-1])
    assert_uncorrelated(heads * torch.ones(32, 32).triu(1), heads.transpose(2, 3))


def test_probabilities_are_rounded_to_16_bits_and_scaled_for_that():
    masks = DropoutMasks(1)
    masks.training_pass(0, 0, np.arange(4))
    with masks.running(4, 1):
        for p in (0.1, 1e-9, 1 - 1e-9):
            noise = masks.noise(torch.empty(4, 70000), p)
            dropped = min(max(round(p * 2**16), 1), 2**16 - 1) / 2**16
            assert noise.max() in (0.0, pytest.approx(1 / (1 - dropped)))


def noise_of(masks, examples, shape, tokens, *, step=3, dtype=torch.float32):
    masks.training_pass(step, 0, np.asarray(examples))
    with masks.running(len(examples), tokens):
        return masks.noise(torch.empty(shape, dtype=dtype), 0.3)


def test_a_row_loses_the_same_in_any_batch_and_at_any_padding():
    masks = DropoutMasks(7)
    whole = noise_of(masks, [5, 9, 2], (3, 6, 10), 6)
    assert torch.equal(noise_of(masks, [2, 5], (2, 8, 10), 8)[:, :6], whole[[2, 0]])
    assert torch.equal(noise_of(masks, [5, 9, 2], (18, 10), 6), whole.flatten(0, 1))  # as OPT flattens it
    assert torch.equal(noise_of(masks, [9], (1, 6, 10), 6, dtype=torch.bfloat16) > 0, whole[1:2] > 0)
    attention = noise_of(masks, [5, 9, 2], (3, 4, 6, 6), 6)
    assert torch.equal(noise_of(masks, [9], (1, 4, 9, 9), 9)[:, :, :6, :6], attention[1:2])
    pooled = noise_of(masks, [5, 9, 2], (3, 10), 6)
    assert torch.equal(noise_of(masks, [2], (1, 10), 4), pooled[2:])


def test_everything_else_gives_other_masks():
    base = noise_of(DropoutMasks(7), [5], (1, 6, 10), 6)
    assert not torch.equal(noise_of(DropoutMasks(8), [5], (1, 6, 10), 6), base)
    assert not torch.equal(noise_of(DropoutMasks(7), [6], (1, 6, 10), 6), base)
    assert not torch.equal(noise_of(DropoutMasks(7), [5], (1, 6, 10), 6, step=4), base)


def test_torch_functions_take_masks_inside_a_pass_only():
    masks, x = DropoutMasks(7), torch.ones(2, 5, 8)
    functions = F.dropout, F.scaled_dot_product_attention, torch.rand
    masks.training_pass(0, 0, np.array([4, 5]))
    state = torch.get_rng_state()
    with masks.running(2, 5):
        first, second, still = nn.Dropout(0.5)(x), F.dropout(x, 0.5), F.dropout(x, 0.5, training=False)
        skipped = torch.rand([]), torch.rand(1)
    assert torch.equal(state, torch.get_rng_state())
    assert (F.dropout, F.scaled_dot_product_attention, torch.rand) == functions
    assert not torch.equal(first, second)
    assert torch.equal(still, x)
    assert skipped[0].shape == () and skipped[1].shape == (1,) and 0 <= skipped[0] != skipped[1] < 1
    with masks.running(2, 5):
        assert torch.equal(nn.Dropout(0.5)(x), first)
    masks.training_pass(0, 0, np.array([0, 1, 2]))
    with masks.running(3, 5):
        # Whether a layer is skipped does not depend on the batch: it is skipped for all micro-batches of a step, or none.
        masks.noise(torch.empty(3, 1), 0.5), masks.noise(torch.empty(3, 1), 0.5)
        assert torch.equal(torch.rand([]), skipped[0])


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True}, {"enable_gqa": True, "scale": 0.3}])
def test_attention_is_that_of_torch_but_for_the_masks(options):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 4, 4))
    if "attn_mask" in options:
        options = {"attn_mask": torch.arange(6).expand(2, 1, 6, 6) < torch.tensor([4, 6])[:, None, None, None]}
    if "enable_gqa" in options:
        key, value = key[:, :2], value[:, :2]
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    masks = DropoutMasks(1)

    def masked(p):
        masks.training_pass(0, 0, np.arange(2))
        with masks.running(2, 6):
            return F.scaled_dot_product_attention(query, key, value, dropout_p=p, **options)

    torch.testing.assert_close(masked(1e-9), expected, atol=1e-4, rtol=1e-4)  # 1 of 2^16 weights is dropped
    masked_once = masked(0.5)
    assert torch.equal(masked(0.5), masked_once)
    assert (masked_once - expected).norm() > 0.2 * expected.norm()


def test_gradients_flow_through_what_is_kept():
    x = torch.ones(2, 64, requires_grad=True)
    masks = DropoutMasks(1)
    masks.training_pass(0, 0, np.arange(2))
    with masks.running(2, 1):
        y = F.dropout(x, 0.25)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert 0 < float((y == 0).sum()) < 64


def test_a_table_loses_the_same_in_all_micro_batches_of_a_step():
    masks = DropoutMasks(1)
    table = TableDropout(0.5, masks)

    def once(step, examples):
        masks.training_pass(step, 0, np.asarray(examples))
        with masks.running(len(examples), 5):
            return table(torch.ones(10, 4))

    assert torch.equal(once(0, [1, 2]), once(0, [7]))  # ten rows are no two examples of five tokens
    assert not torch.equal(once(0, [1, 2]), once(1, [1, 2]))
    assert torch.equal(table.eval()(torch.ones(3, 3)), torch.ones(3, 3))


def test_what_has_no_rows_is_refused():
    masks = DropoutMasks(1)
    masks.training_pass(0, 0, np.arange(2))
    with masks.running(2, 5), pytest.raises(ConfigError, match=re.escape("shape (5, 2, 8) in a forward pass of 2 rows and 5 tokens")):
        F.dropout(torch.ones(5, 2, 8), 0.1)
    with masks.running(2, 5), pytest.raises(ConfigError, match=r"dropout2d.*set --dropout_masks framework"):
        F.dropout2d(torch.ones(2, 5, 3, 3), 0.1, training=True)
    assert F.dropout2d(torch.ones(2, 5, 3, 3), 0.1, training=False).shape == (2, 5, 3, 3)
    with pytest.raises(ConfigError, match="has 3 rows, and 2 were announced"), masks.running(3, 5):
        pass
