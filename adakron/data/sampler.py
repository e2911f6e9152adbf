"""Which examples make which global batch, and which of them this rank sees in which micro-batch.

The global order is a pure function of (seed, epoch): a global batch holds the same examples however many ranks, and however
large the micro-batches. Inside a global batch the examples are sorted by length, so that a micro-batch holds similar
lengths and the ranks of one round do similar work.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's examples.

    examples: indices of all examples of the global batch, on all ranks alike.
    micro_batches: this rank's share, equally many on every rank; an empty one is there only to keep the ranks in step.
    """

    examples: np.ndarray
    micro_batches: tuple[np.ndarray, ...]


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(examples) that depends on (seed, epoch) alone: the ranks of Philox's raw 64-bit draws.

    Raw draws, because numpy promises the same stream for them in every version, and not for `Generator.permutation`.
    """
    draws = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=np.array([0, 0, 0, epoch], dtype=np.uint64))
    return np.argsort(draws.random_raw(examples), kind="stable")


class GlobalBatchSampler:
    """Deals the examples of an epoch out to optimizer steps, micro-batches and ranks.

    lengths: (examples,) in tokens. micro_batch: examples per forward pass and rank, at most; it may be changed between steps. global_batch:
    examples per step; the last one of an epoch takes what is left.
    """

    def __init__(self, lengths: np.ndarray, *, micro_batch: int, global_batch: int, world_size: int = 1, rank: int = 0, seed: int = 0):
        self.lengths = np.asarray(lengths)
        self.micro_batch = micro_batch
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.global_batch = global_batch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, the last partial one included."""
        return -(-len(self.lengths) // self.global_batch)

    def rounds(self, examples: int) -> int:
        """Micro-batches of each rank in a step of so many examples."""
        return -(-examples // (self.micro_batch * self.world_size))

    @property
    def most_rows(self) -> int:
        """Examples of the largest micro-batch of any step and rank."""
        last = len(self.lengths) % self.global_batch
        sizes = [self.global_batch, last] if len(self.lengths) > self.global_batch else [len(self.lengths)]
        return max(-(-size // (self.rounds(size) * self.world_size)) for size in sizes if size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[GlobalBatch]:
        """The global batches of an epoch, from first_step on."""
        order = epoch_order(len(self.lengths), self.seed, epoch)
        for step in range(first_step, self.steps_per_epoch):
            examples = order[step * self.global_batch : (step + 1) * self.global_batch]
            yield GlobalBatch(examples=examples, micro_batches=self._share(examples))

    def _share(self, examples: np.ndarray) -> tuple[np.ndarray, ...]:
        # Longest first: a step that does not fit into memory fails at its first micro-batch.
        by_length = examples[np.argsort(-self.lengths[examples], kind="stable")]
        chunks = np.array_split(by_length, self.rounds(len(examples)) * self.world_size)
        return tuple(chunks[self.rank :: self.world_size])


def evaluation_batches(lengths: np.ndarray, batch_size: int, world_size: int, rank: int) -> tuple[np.ndarray, ...]:
    """This rank's batches of an evaluation: length-sorted, the same batches whatever the world size, equally many per rank.

    A rank that runs out of batches gets empty ones: its forward passes must still match its peers'.
    """
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    rounds = -(-len(batches) // world_size)
    batches += [by_length[:0]] * (rounds * world_size - len(batches))
    return tuple(batches[rank::world_size])
