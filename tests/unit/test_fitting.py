"""--auto_micro_batch's search, with an engine and passes that only count rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adakron.data.sampler import GlobalBatchSampler
from adakron.errors import ConfigError
from adakron.fitting import fit_micro_batch, tried
from adakron.tasks.base import EncodedSplit

LENGTHS = np.arange(1, 41)


def split(targets: np.ndarray | None = None) -> EncodedSplit:
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    targets = np.ones(len(LENGTHS), np.int64) if targets is None else targets
    return EncodedSplit({"input_ids": np.zeros(offsets[-1], np.int64)}, offsets, None, targets, 0)


class Memory:
    """Passes that fit up to so many rows."""

    def __init__(self, rows: int, error: Exception | None = None):
        self.rows = rows
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.seen: list[int] = []

    def rehearse(self, examples: np.ndarray) -> None:
        torch.rand(1)
        self.seen.append(len(examples))
        if len(examples) > self.rows:
            raise self.error


def fit(memory: Memory, micro_batch: int, global_batch: int = 32):
    sampler = GlobalBatchSampler(LENGTHS, micro_batch=micro_batch, global_batch=global_batch)
    engine = SimpleNamespace(device=torch.device("cpu"), train=lambda: None)
    return fit_micro_batch(engine, memory, sampler, split()), sampler  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "micro_batch", "taken", "passes"),
    [(100, 16, 16, 2), (8, 32, 8, 4), (7, 32, 4, 8), (1, 12, 1, 32), (32, 64, 64, 1), (16, 64, 16, 2)],
)
def test_it_halves_what_a_step_really_has_until_it_fits(rows, micro_batch, taken, passes):
    found, sampler = fit(Memory(rows), micro_batch)
    assert (found.asked, found.taken, found.passes) == (micro_batch, taken, passes)
    assert sampler.micro_batch == taken
    assert {len(batch.examples) for batch in sampler.epoch(0)} == {32, 8}
    assert max(len(one) for batch in sampler.epoch(0) for one in batch.micro_batches) <= rows


def test_it_draws_no_random_numbers_of_the_run():
    before = torch.get_rng_state()
    fit(Memory(4), 32)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_example_too_large_is_an_error_and_other_errors_pass():
    with pytest.raises(ConfigError, match=r"one example of 40 tokens does not fit into memory.*--gradient_checkpointing"):
        fit(Memory(0), 32)
    with pytest.raises(RuntimeError, match="shape"):
        fit(Memory(4, RuntimeError("shape '[2]' is invalid")), 32)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
    ],
)
def test_memory_runs_out_with_several_exceptions(error):
    assert fit(Memory(4, error), 32)[0].taken == 4


def test_the_longest_and_those_with_the_most_targets_come_first():
    found = tried(split(), 4)
    assert found[0].tolist() == found[-1].tolist() == [39, 38, 37, 36]
    assert found[2].tolist() == [3, 2, 1, 0]
    targets = LENGTHS[::-1].copy()
    assert sorted(tried(split(targets), 4)[1].tolist()) == [0, 1, 2, 3]
    assert [len(examples) for examples in tried(split(), 40)] == [40, 40]


@pytest.mark.parametrize(
    ("micro_batch", "global_batch", "world", "most"), [(8, 32, 1, 8), (8, 20, 1, 7), (64, 32, 2, 16), (7, 20, 1, 7), (8, 64, 2, 7)]
)
def test_most_rows_are_those_of_the_largest_micro_batch(micro_batch, global_batch, world, most):
    samplers = [
        GlobalBatchSampler(LENGTHS, micro_batch=micro_batch, global_batch=global_batch, world_size=world, rank=rank)
        for rank in range(world)
    ]
    seen = max(len(one) for sampler in samplers for batch in sampler.epoch(0) for one in batch.micro_batches)
    assert samplers[0].most_rows == seen == most
