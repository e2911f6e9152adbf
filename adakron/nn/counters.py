"""A counter-based generator in tensor operations: every draw is a hash of where it is used, so no stream is shared or advanced.

Keys are 64-bit integers mixed from counters one by one with SplitMix64's finalizer (Steele, Lea and Flood, 2014). A row's key and a
column's key give one 64-bit word, cut into four draws of 16 bits. Equations and measured quality: `README.md` in this folder.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DRAW_BITS = 16
DRAWS_PER_WORD = 64 // DRAW_BITS

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 0xD6E8FEB86659FD93
_WORDS_IN_CACHE = 2**15
_COLUMNS = 1  # the key that columns' keys are mixed from

_columns: dict[torch.device, Tensor] = {}


def signed(value: int) -> int:
    """A 64-bit word as torch's int64 holds it."""
    value &= 2**64 - 1
    return value - 2**64 if value >> 63 else value


def mixed(key: int, counter: int) -> int:
    """The key of a counter below another key; all of them 64-bit words."""
    z = (key + (counter + 1) * _GOLDEN) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * _FIRST) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * _SECOND) & (2**64 - 1)
    return z ^ (z >> 31)


def mixed_array(key: int, counters: np.ndarray) -> np.ndarray:
    """`mixed` for many counters: an array of its shape, whose int64 are the words' bits."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
        return (z ^ (z >> np.uint64(31))).view(np.int64)


def mixed_tensor(keys: Tensor, count: int) -> Tensor:
    """`mixed` of every key with every counter below count: int64 of the keys' shape and one more dimension."""
    counters = torch.arange(1, count + 1, device=keys.device) * signed(_GOLDEN)
    return _finalize(keys[..., None] + counters)


def mixed_with(keys: Tensor, counter: int) -> Tensor:
    """`mixed` of every key with one counter."""
    return _finalize(keys + signed((counter + 1) * _GOLDEN))


def draws(row_keys: Tensor, width: int) -> Tensor:
    """Uniform draws for rows of that many columns: int16 over its whole range, of the keys' shape and (width,).

    A draw depends on its row's key and its column alone, so a row that is longer begins with the same draws.
    """
    words = row_keys[..., None] ^ column_keys(width, row_keys.device)
    # torch shifts int64 arithmetically. Adding the high half with its sign loses no bit, as a xor with it would. Sums and products
    # with constants alone would keep the difference of two words; w(2w + 1) does not, and is one to one.
    words.mul_(signed(_WORD))
    high = words >> 32
    words.add_(high)
    words.addcmul_(words, words, value=2)
    words.add_(torch.bitwise_right_shift(words, 32, out=high))
    return words.view(torch.int16)[..., :width]


def at_least(row_keys: Tensor, limit: int, out: Tensor) -> Tensor:
    """Write 1 into out where a draw is at least limit, else 0. out: contiguous, of any dtype, of the keys' shape and (columns,)."""
    rows, columns = row_keys.flatten(), out.view(-1, out.shape[-1])
    # On a CPU in pieces that stay in its cache: fresh memory for all words at once would take longer than the arithmetic.
    most = max(1, _WORDS_IN_CACHE * DRAWS_PER_WORD // max(1, out.shape[-1])) if out.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), most):
        piece = columns[start : start + most]
        torch.ge(draws(rows[start : start + most], out.shape[-1]), limit, out=piece)
    return out


def threshold(probability: float) -> int:
    """The draw below which a share `probability` in (0, 1) of all draws lies, rounded to a multiple of 2^-16 that is neither 0 nor 1."""
    share = min(max(round(probability * 2**DRAW_BITS), 1), 2**DRAW_BITS - 1)
    return share - 2 ** (DRAW_BITS - 1)


def share_kept(limit: int) -> float:
    """The share of draws that are at least a limit of `threshold`."""
    return 1.0 - (limit + 2 ** (DRAW_BITS - 1)) / 2**DRAW_BITS


def column_keys(width: int, device: torch.device) -> Tensor:
    """The keys of the words of rows of that many columns; a row's key and a word's are what the word is made from."""
    # The same for all rows, so made once and kept; doubled when a longer row comes.
    count = -(-width // DRAWS_PER_WORD)
    kept = _columns.get(device)
    if kept is None or len(kept) < count:
        # Whole vectors of words, which kernels read also behind the last column.
        size = max(-(-count // 256) * 256, 2 * len(kept) if kept is not None else 256)
        kept = torch.from_numpy(mixed_array(_COLUMNS, np.arange(size))).to(device)
        _columns[device] = kept
    return kept[:count]


def uniform(key: int) -> float:
    """A number in [0, 1) from a key."""
    return mixed(key, 0) / 2**64


def key_of(seed: int, counters: Sequence[int]) -> int:
    """The key below a seed at the end of a path of counters."""
    key = seed
    for counter in counters:
        key = mixed(key, counter)
    return key


def _finalize(z: Tensor) -> Tensor:
    # The masks make torch's arithmetic shifts logical.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * signed(_FIRST)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * signed(_SECOND)
    return z ^ ((z >> 31) & (2**33 - 1))
