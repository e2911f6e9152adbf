from dataclasses import dataclass

import numpy as np
import pytest
import torch

from adakron.data.collation import pad_batch


@dataclass
class Tokens:
    features: dict[str, np.ndarray]
    offsets: np.ndarray


def tokens_of(*rows: list[int], types: bool = False) -> Tokens:
    flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    features = {"input_ids": flat} | ({"token_type_ids": np.ones_like(flat)} if types else {})
    return Tokens(features, np.cumsum([0, *map(len, rows)]))


def test_rows_are_right_padded_in_the_order_asked_for() -> None:
    encoded = tokens_of([1, 2, 3], [4], [5, 6], types=True)
    batch = pad_batch(encoded, [2, 0], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 9], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple", "limit", "width"), [(1, None, 5), (4, None, 8), (8, None, 8), (4, 6, 6), (4, 100, 8), (1, 5, 5)])
def test_width_is_rounded_up_but_stays_within_the_limit(multiple: int, limit: int | None, width: int) -> None:
    encoded = tokens_of([1, 2, 3, 4, 5], [6])
    batch = pad_batch(encoded, [0, 1], pad_token_id=0, pad_to_multiple_of=multiple, max_length=limit)
    assert batch["input_ids"].shape == (2, width)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 1]


def test_width_depends_on_the_batch_and_not_on_the_split() -> None:
    encoded = tokens_of(list(range(50)), [1, 2])
    assert pad_batch(encoded, [1], pad_token_id=0)["input_ids"].tolist() == [[1, 2]]


def test_an_empty_batch_has_no_rows_and_some_width() -> None:
    batch = pad_batch(tokens_of([1, 2]), [], pad_token_id=0, pad_to_multiple_of=8)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (0, 8)


def test_every_token_of_a_large_split_arrives() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 1000, rng.integers(1, 40)).tolist() for _ in range(300)]
    order = rng.permutation(300)
    batch = pad_batch(tokens_of(*rows), order, pad_token_id=0, pad_to_multiple_of=8)
    for row, index in enumerate(order):
        assert batch["input_ids"][row, : len(rows[index])].tolist() == rows[index]
        assert not batch["input_ids"][row, len(rows[index]) :].any()
