"""Where training stands: what a run reports of it, and what it needs to go on as if it had never stopped."""

import base64
import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from adakron.engine.state import EngineState
from adakron.metrics import Reduce, Unlogged, share_unlogged


@dataclass
class TrainState:
    """Where training stands; written as trainer_state.json."""

    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = 0
    skipped_steps: int = 0
    nonfinite_steps: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    metric_for_best_model: str = ""
    log_history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """What training ended with.

    tensors: the trainable parameters to keep, the best where load_best_model_at_end asked for them. loss: mean over all
    steps. seconds: training alone, without evaluation and saving. samples, tokens: seen, without padding.
    scores: the evaluation of exactly these tensors, with prefixes; None where training never evaluated them.
    """

    tensors: Mapping[str, Tensor]
    loss: float
    seconds: float
    samples: int
    tokens: int
    state: TrainState
    scores: Mapping[str, float] | None


@dataclass
class Sums:
    """What adds up over training.

    epoch, batches: the position in the data, batches of the epoch being behind. seconds: of training alone. samples, tokens: seen,
    without padding. loss_sum: over the logged steps, the newest of which is logged_step. window: seconds, samples, tokens then.
    """

    epoch: int = 0
    batches: int = 0
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    logged_step: int = 0
    window: tuple[float, int, int] = (0.0, 0, 0)


@dataclass
class Due:
    """What a step that is behind still owes: an evaluation that was stopped, the checkpoint after it."""

    evaluation: bool = False
    checkpoint: bool = False


@dataclass(frozen=True)
class RankState:
    """What differs between ranks. random: see `random_states`. unlogged: see `MetricRecorder.unlogged`. spikes: see `LossSpikes.state`."""

    random: Mapping[str, Any]
    unlogged: Unlogged
    spikes: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """Everything that training needs to go on, on the host; nothing in it changes any more.

    best: the best evaluated tensors where they will be wanted at the end, and best_scores theirs. last_scores: step and scores of
    the newest evaluation. ranks: by rank.
    """

    engine: EngineState
    train: TrainState
    sums: Sums
    due: Due
    best: Mapping[str, Tensor] | None
    best_scores: Mapping[str, float] | None
    last_scores: tuple[int, Mapping[str, float]] | None
    ranks: Sequence[RankState]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.engine.global_step


def take(snapshot_of: TrainState, sums: Sums, due: Due) -> tuple[TrainState, Sums, Due]:
    """Copies that the loop no longer changes."""
    history = [dict(entry) for entry in snapshot_of.log_history]
    return dataclasses.replace(snapshot_of, log_history=history), dataclasses.replace(sums), dataclasses.replace(due)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of every random generator of this process, as JSON has them: torch on host and device, numpy, Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, next_gauss = random.getstate()
    return {
        "torch": _packed(torch.get_rng_state().numpy()),
        "cuda": _packed(torch.cuda.get_rng_state(device).numpy()) if device.type == "cuda" else None,
        "numpy": [kind, _packed(np.asarray(keys, dtype="<u4")), position, has_gauss, gauss],
        "python": [version, _packed(np.asarray(internal, dtype="<u4")), next_gauss],
    }


def restore_random(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `random_states`. Raises KeyError, TypeError or ValueError where these are not such states."""
    torch.set_rng_state(torch.from_numpy(_unpacked(states["torch"], "u1")))
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(torch.from_numpy(_unpacked(states["cuda"], "u1")), device)
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, _unpacked(keys, "<u4"), position, has_gauss, gauss))
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(_unpacked(internal, "<u4").tolist()), next_gauss))


def check_rank(state: RankState) -> None:
    """Raise KeyError, TypeError, ValueError or RuntimeError where a rank cannot go on with what a file says of it; changes nothing."""
    random_state = state.random
    torch.Generator().set_state(torch.from_numpy(_unpacked(random_state["torch"], "u1")))
    if random_state["cuda"] is not None:
        _unpacked(random_state["cuda"], "u1")
    kind, keys, position, has_gauss, gauss = random_state["numpy"]
    np.random.RandomState().set_state((kind, _unpacked(keys, "<u4"), position, has_gauss, gauss))
    version, internal, next_gauss = random_state["python"]
    random.Random().setstate((version, tuple(_unpacked(internal, "<u4").tolist()), next_gauss))
    for reduce, values in state.unlogged.values():
        if reduce not in get_args(Reduce):
            raise ValueError(f"a metric is reduced by {reduce!r}")
        torch.tensor(values, dtype=torch.float64)
    for name in ("window", "pending"):
        torch.tensor(state.spikes[name], dtype=torch.float64)


def restore_rank(snapshot: Snapshot, rank: int, world_size: int, seed: int, device: torch.device) -> tuple[Unlogged, Mapping[str, Any]]:
    """Set this rank's random generators, and return its share of the metrics that were not logged yet, and of the loss spikes' state.

    As many ranks as at the time of the snapshot go on with their own generators; another number of ranks gets new ones, which
    depend on (seed, step, rank) alone.
    """
    if len(snapshot.ranks) == world_size:
        restore_random(snapshot.ranks[rank].random, device)
        return snapshot.ranks[rank].unlogged, snapshot.ranks[rank].spikes
    draws = np.random.SeedSequence([seed, snapshot.step, rank]).generate_state(3)
    torch.manual_seed(int(draws[0]))
    np.random.seed(int(draws[1]))
    random.seed(int(draws[2]))
    # The losses of steps are shares that add up over the ranks.
    pending = [sum(shares) if rank == 0 else 0.0 for shares in zip(*(state.spikes["pending"] for state in snapshot.ranks), strict=True)]
    spikes = {**snapshot.ranks[0].spikes, "pending": pending}
    return share_unlogged([state.unlogged for state in snapshot.ranks], rank), spikes


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=dtype)
