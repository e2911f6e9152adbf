"""`--verify_batch_invariance`: that a step's gradient is one number, however its examples are cut into micro-batches."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from adakron import distributed
from adakron.data.sampler import GlobalBatch
from adakron.engine.engine import TrainingEngine
from adakron.errors import NumericalError
from adakron.log import get_logger
from adakron.passes import ForwardPass, StepPasses

logger = get_logger(__name__)

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-1, "fp16": 1e-2}
"""Largest difference of a tensor's gradient that is rounding, as a share of the norm of the whole gradient."""


def verify_batch_invariance(engine: TrainingEngine, passes: StepPasses, batch: GlobalBatch) -> float | None:
    """Compare the gradient of a step in the run's own micro-batches with that in others, on every rank's own examples.

    The others are halves, or one of all where a micro-batch is one example. Returns the largest difference of any tensor on any rank as
    a share of the gradient's norm; None where there is nothing to cut or join. Changes nothing of the run: parameters,
    optimizer, random streams and the order of examples stay as they are. All ranks together.
    Raises NumericalError, on every rank, where the difference is more than rounding.
    """
    own = passes.places(batch)
    longest = max(distributed.all_gather_object(max(len(place.examples) for place in own)))
    if longest > 1:
        other, described = [half for place in own for half in _halves(place)], "halves of the micro-batches"
    elif len(own) > 1:
        examples = [place.examples for place in own if not place.filler]
        other, described = [dataclasses.replace(own[0], examples=np.concatenate(examples or [own[0].examples]))], "one micro-batch of all"
    else:
        logger.info("batch invariance: a step on each rank is one example, so there is no other micro-batch to compare with")
        return None
    engine.train()
    with _random_streams_kept(engine.device):
        targets = passes.targets(batch)
        found = passes.local_gradient(own, targets)
        again = passes.local_gradient(other, targets)
    worst, name = _largest_difference(found, again)
    tolerance = TOLERANCES[engine.precision]
    if not worst <= tolerance:
        raise NumericalError(
            f"the gradient of one step differs by {worst:.1e} of its norm, most in {name}, between the run's micro-batches and"
            f" {described}; rounding in {engine.precision} explains {tolerance:.0e}; something mixes the examples of a micro-batch, or"
            " draws random numbers by micro-batch: set --dropout_masks per_example or --dropout 0, and look for experts drawn per"
            " micro-batch, batch statistics or a loss that is a mean (drop --verify_batch_invariance to train all the same)"
        )
    logger.info("batch invariance: gradients in %s differ by %.1e of their norm (%s)", described, worst, engine.precision)
    return worst


def _halves(place: ForwardPass) -> list[ForwardPass]:
    """Two, on every rank: an empty half becomes a filler."""
    middle = len(place.examples) // 2
    halves = place.examples[:middle], place.examples[middle:]
    return [
        dataclasses.replace(place, examples=half if len(half) else place.examples, filler=place.filler or not len(half)) for half in halves
    ]


def _largest_difference(found: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> tuple[float, str]:
    """Of any tensor's gradient, as a share of the norm of all, and its name; over all ranks, and the same on each."""
    norm = torch.stack([part.norm() for part in found.values()]).norm().clamp_min(torch.finfo(torch.float32).tiny)
    shares = torch.stack([(again[name] - part).norm() for name, part in found.items()]) / norm
    # A NaN is the largest of all.
    shares = shares.nan_to_num(nan=math.inf)
    place = int(shares.argmax())
    every = distributed.all_gather_object((float(shares[place]), list(found)[place]))
    return max(every)


@contextmanager
def _random_streams_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
