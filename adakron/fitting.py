"""`--auto_micro_batch`: the largest micro-batch that memory takes, found before training."""

from dataclasses import dataclass

import numpy as np
import torch

from adakron import distributed
from adakron.data.sampler import GlobalBatchSampler
from adakron.engine.engine import TrainingEngine
from adakron.errors import ConfigError
from adakron.log import get_logger
from adakron.memory import give_back, is_out_of_memory
from adakron.passes import StepPasses
from adakron.tasks.base import EncodedSplit

logger = get_logger(__name__)


@dataclass(frozen=True)
class MicroBatchFit:
    """What was found. asked, taken: examples per forward pass and rank. passes: micro-batches of a full step on each rank."""

    asked: int
    taken: int
    passes: int

    def __str__(self) -> str:
        size = f"micro-batch {self.taken}" + (f" instead of {self.asked}" if self.taken != self.asked else " fits into memory")
        return f"{size}, {self.passes} {'pass' if self.passes == 1 else 'passes'} a step"


def fit_micro_batch(engine: TrainingEngine, passes: StepPasses, sampler: GlobalBatchSampler, train: EncodedSplit) -> MicroBatchFit:
    """Halve the sampler's micro-batch until the heaviest one of the run fits into every rank's memory. All ranks together.

    Each is tried, forward and backward, while what an optimizer step takes besides is held. No rank waits for another in a try, and
    after it all know whether one of them had too little. Nothing of the run changes but the micro-batch: parameters, optimizer,
    random streams and the examples of a step stay as they are.
    Raises ConfigError, on every rank, where one example does not fit.
    """
    asked = sampler.micro_batch
    engine.train()
    while not _fits_everywhere(engine, passes, train, rows := sampler.most_rows):
        logger.info("micro-batch %d does not fit into memory", rows)
        if rows == 1:
            raise ConfigError(
                f"one example of {int(train.lengths.max())} tokens does not fit into memory, and --auto_micro_batch can take no less; lower"
                " --max_seq_length, add --gradient_checkpointing, or deal the model out to the ranks (--deepspeed ds_configs/zero3.json)"
            )
        sampler.micro_batch = rows // 2
    fit = MicroBatchFit(asked, sampler.micro_batch, sampler.rounds(min(sampler.global_batch, len(sampler.lengths))))
    logger.info("%s", fit)
    return fit


def _fits_everywhere(engine: TrainingEngine, passes: StepPasses, train: EncodedSplit, rows: int) -> bool:
    here = all(_fits(engine, passes, examples) for examples in tried(train, rows))
    give_back(engine.device)
    return not bool(distributed.all_reduce_max(torch.tensor(float(not here))))


def tried(train: EncodedSplit, rows: int) -> list[np.ndarray]:
    """Micro-batches of so many examples, of which the first or the second takes as much memory as any of the split: the longest, and
    those with the most targets where others are longer. Behind them lighter ones, and the longest again, as in the steps to come:
    what allocators keep from one fits the next badly.
    """
    by_length = np.argsort(-train.lengths, kind="stable")
    longest, others = by_length[:rows], len(train) - rows
    most = np.argsort(-train.target_counts, kind="stable")[:rows]
    alike = train.target_counts[most].sum() == train.target_counts[longest].sum()
    lighter = [by_length[start : start + rows] for start in (others // 2, others) if start > 0]
    return [longest, *([] if alike else [most]), *lighter, longest]


def _fits(engine: TrainingEngine, passes: StepPasses, examples: np.ndarray) -> bool:
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        try:
            passes.rehearse(examples)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
    return True
