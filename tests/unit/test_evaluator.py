from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adakron import distributed
from adakron.errors import NumericalError
from adakron.evaluator import Evaluator
from adakron.tasks.base import EncodedSplit

LENGTHS = np.random.default_rng(1).integers(1, 30, size=17)


class EchoTask:
    """An example's output is its own index, so that a wrong order shows."""

    def collate(self, encoded, indices, pad_token_id):
        return {"input_ids": torch.as_tensor(np.asarray(indices))[:, None]}

    def predict(self, forward, batch):
        return forward(**batch).logits

    def score(self, split, outputs):
        return {"sum": float(outputs.sum())}


def split() -> EncodedSplit:
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    return EncodedSplit(features={}, offsets=offsets, labels=None, target_counts=np.ones(len(LENGTHS), dtype=np.int64), truncated=0)


def evaluator(world_size: int = 1, rank: int = 0) -> Evaluator:
    return Evaluator(
        EchoTask(),
        batch_size=4,
        pad_token_id=0,
        device=torch.device("cpu"),
        world_size=world_size,
        rank=rank,
        disable_progress=True,  # type: ignore[arg-type]
    )


def forward(**inputs: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=inputs["input_ids"].float())


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_outputs_come_in_the_splits_order_each_once(world_size, monkeypatch):
    calls: list[int] = []

    def counting(**inputs: torch.Tensor) -> SimpleNamespace:
        calls[-1] += 1
        return forward(**inputs)

    shares = []
    for rank in range(world_size):
        calls.append(0)
        monkeypatch.setattr(distributed, "all_gather_object", lambda mine: (shares.append(mine), [mine])[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("adakron.evaluator._in_order", lambda parts, examples: np.zeros((1, 1)))
            evaluator(world_size, rank).outputs(counting, split())
    assert len(set(calls)) == 1  # equal forward counts, or ZeRO-3 hangs
    monkeypatch.setattr(distributed, "all_gather_object", lambda mine: shares)
    assert evaluator().outputs(forward, split())[:, 0].tolist() == list(range(17))


def test_an_output_that_is_no_number_is_named():
    def broken(**inputs: torch.Tensor) -> SimpleNamespace:
        logits = inputs["input_ids"].float()
        return SimpleNamespace(logits=logits.masked_fill(logits == 5.0, float("nan")))

    with pytest.raises(NumericalError, match="evaluating validation: 1 of 17 outputs are not finite, the first for example 5"):
        evaluator().score(broken, "validation", split())
