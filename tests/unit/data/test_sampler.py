import numpy as np
import pytest

from adakron.data.sampler import GlobalBatchSampler, epoch_order, evaluation_batches

LENGTHS = np.random.default_rng(0).integers(3, 60, size=101)


def deal(micro_batch: int, global_batch: int, world_size: int, epoch: int = 0) -> list[list[list[np.ndarray]]]:
    """By step, by rank, the micro-batches."""
    samplers = [
        GlobalBatchSampler(LENGTHS, micro_batch=micro_batch, global_batch=global_batch, world_size=world_size, rank=rank, seed=7)
        for rank in range(world_size)
    ]
    by_rank = [[list(batch.micro_batches) for batch in sampler.epoch(epoch)] for sampler in samplers]
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    orders = {(seed, epoch): epoch_order(101, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(101)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_order(101, 0, 1).tolist() == orders[0, 1]


def test_epoch_order_never_changes():
    # A resumed run must see the data in the order in which it was started, whatever numpy is installed.
    assert epoch_order(8, seed=42, epoch=3).tolist() == [7, 6, 1, 0, 4, 5, 2, 3]


@pytest.mark.parametrize(("micro_batch", "world_size"), [(16, 1), (8, 1), (8, 2), (4, 2), (2, 4), (1, 1), (4, 3), (5, 2), (16, 7)])
def test_a_global_batch_holds_the_same_examples_whatever_the_geometry(micro_batch, world_size):
    expected = [sorted(epoch_order(101, 7, 0)[start : start + 16].tolist()) for start in range(0, 101, 16)]
    steps = deal(micro_batch, 16, world_size)
    assert [sorted(int(i) for rank in step for micro in rank for i in micro) for step in steps] == expected


@pytest.mark.parametrize(
    ("micro_batch", "global_batch", "world_size", "most"),
    [(8, 16, 1, 2), (4, 16, 2, 2), (2, 16, 4, 2), (3, 18, 3, 2), (3, 16, 3, 2), (9, 16, 5, 1)],
)
def test_ranks_run_equally_many_micro_batches_of_at_most_the_asked_size(micro_batch, global_batch, world_size, most):
    for step in deal(micro_batch, global_batch, world_size):
        assert len({len(rank) for rank in step}) == 1
        assert len(step[0]) <= most
        assert max(len(micro) for rank in step for micro in rank) <= micro_batch


def test_the_last_batch_of_an_epoch_keeps_what_is_left():
    sampler = GlobalBatchSampler(LENGTHS, micro_batch=8, global_batch=32, world_size=2)
    assert sampler.steps_per_epoch == 4
    assert [len(batch.examples) for batch in sampler.epoch(0)] == [32, 32, 32, 5]


def test_micro_batches_hold_similar_lengths():
    def padding(micro_batches):
        return sum(len(micro) * LENGTHS[micro].max() - LENGTHS[micro].sum() for micro in micro_batches if len(micro))

    bucketed = [micro for step in deal(4, 16, 1) for rank in step for micro in rank]
    order = epoch_order(101, 7, 0)
    plain = [order[start : start + 4] for start in range(0, 101, 4)]
    assert padding(bucketed) < 0.5 * padding(plain)


def test_an_epoch_can_start_in_its_middle():
    sampler = GlobalBatchSampler(LENGTHS, micro_batch=8, global_batch=8, seed=3)
    whole = [batch.examples.tolist() for batch in sampler.epoch(2)]
    assert [batch.examples.tolist() for batch in sampler.epoch(2, first_step=5)] == whole[5:]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_batches_are_the_same_for_every_world_size(world_size):
    shares = [evaluation_batches(LENGTHS, 8, world_size, rank) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    together = {tuple(batch.tolist()) for share in shares for batch in share if len(batch)}
    assert together == {tuple(batch.tolist()) for batch in evaluation_batches(LENGTHS, 8, 1, 0)}
    assert sorted(i for batch in together for i in batch) == list(range(101))
