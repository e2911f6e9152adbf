"""Which expert a projection uses: drawn from counters, so that every rank and every resumed run draws the same."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

_TRAINING, _EVALUATION = 0, 1  # second half of the generator's key: the two purposes never share a stream

SLOTS = 3
"""Projections of one adapter at most."""


class Router:
    """Draws experts as a pure function of (seed, step, micro-step, pass, site, projection), with Philox as the generator.

    seed: of the run. sites: number of adapters; each knows its own index. Nothing is read from a device, so nothing waits.
    The loop says where it stands before every forward pass: `training_pass` or `evaluation_batch`.
    """

    def __init__(self, seed: int, sites: int):
        self.seed = seed
        self.sites = sites
        self._position = (0, 0, 0)
        self._draws: list[int] | None = None
        self._batch = 0
        self._calls: dict[tuple[int, int], int] = {}

    def training_pass(self, step: int, micro_step: int, pass_index: int = 0) -> None:
        """The next forward pass is that of a micro-batch of a global step; pass_index counts its forward passes, from 0."""
        self._position, self._draws = (step, micro_step, pass_index), None

    def evaluation_batch(self, index: int) -> None:
        """The next forward passes are those of an evaluation's batch, numbered over all ranks."""
        self._batch = index
        self._calls.clear()

    def expert(self, site: int, slot: int, num_experts: int) -> int:
        """The expert of a projection in this training pass; slot is the projection's index in its adapter."""
        if self._draws is None:
            step, micro_step, pass_index = self._position
            # The first counter word counts blocks of four draws; the others are ours.
            counter = np.array([0, pass_index, micro_step, step], dtype=np.uint64)
            raw = np.random.Philox(key=np.array([self.seed, _TRAINING], dtype=np.uint64), counter=counter)
            self._draws = [int(draw) for draw in raw.random_raw(self.sites * SLOTS)]
        # Of 2^64 values the modulo favours the first experts by less than 1 in 10^18.
        return self._draws[site * SLOTS + slot] % num_experts

    def generator(self, site: int, slot: int, device: torch.device, *, per_call: bool) -> torch.Generator:
        """For random experts in evaluation: a generator on the device for this projection and batch.

        per_call: another one in every forward pass of the batch (a decoder makes one per new token), else always the same.
        """
        call = self._calls.get((site, slot), 0)
        self._calls[site, slot] = call + 1
        counter = np.array([0, call if per_call else 0, 0, self._batch], dtype=np.uint64)
        raw = np.random.Philox(key=np.array([self.seed, _EVALUATION], dtype=np.uint64), counter=counter)
        seed = int(raw.random_raw(self.sites * SLOTS)[site * SLOTS + slot]) >> 1  # torch takes 63 bits
        return torch.Generator(device).manual_seed(seed)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` for `torch.utils.checkpoint`: what is computed again in the backward pass uses the same experts again.

        By then the loop may have gone on, to the second pass of a consistency loss.
        """
        return nullcontext(), self._again(self._position)

    @contextmanager
    def _again(self, position: tuple[int, int, int]) -> Iterator[None]:
        now = self._position
        self.training_pass(*position)
        try:
            yield
        finally:
            self.training_pass(*now)
