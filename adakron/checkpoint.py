"""The training state of a checkpoint folder: tensors in safetensors, everything else in JSON; and the thread that writes it.

training_state.safetensors holds "<kind>/<parameter>" with the kinds of `engine.state.KINDS`, and "best/<parameter>" where the best
adapter will be wanted at the end. training_state.json holds the rest, trainer_state.json what is shown of it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from adakron import run_folder
from adakron.atomic import publish
from adakron.engine.state import KINDS, EngineState, LossScaleState
from adakron.errors import CheckpointError
from adakron.store import CheckpointStore, Examined
from adakron.tensor_file import read_tensor_file, write_tensor_file
from adakron.train_state import Due, RankState, Snapshot, Sums, TrainState, check_rank

TENSORS_FILE = "training_state.safetensors"
TRAINING_STATE_FILE = "training_state.json"
FORMAT_VERSION = 1
_BEST = "best"


@dataclasses.dataclass(frozen=True)
class SavedTraining:
    """What a checkpoint folder says: the snapshot, and what the run said of itself (see `launch.resuming`)."""

    snapshot: Snapshot
    run: Mapping[str, Any]


def write_training_state(folder: Path, snapshot: Snapshot, run: Mapping[str, Any]) -> None:
    """Write the training state into an existing folder. run: what must hold for a run that goes on from here, for JSON."""
    engine = snapshot.engine
    tensors = {f"{kind}/{name}": tensor for kind in KINDS for name, tensor in engine.tensors[kind].items()}
    tensors |= {f"{_BEST}/{name}": tensor for name, tensor in (snapshot.best or {}).items()}
    with publish(folder / TENSORS_FILE) as partial:
        write_tensor_file(partial, tensors)
    content = {
        "format_version": FORMAT_VERSION,
        "global_step": engine.global_step,
        "skipped_steps": engine.skipped_steps,
        "skipped_in_a_row": engine.skipped_in_a_row,
        "steps": engine.steps,
        "loss_scale": dataclasses.asdict(engine.loss_scale) if engine.loss_scale else None,
        "sums": dataclasses.asdict(snapshot.sums),
        "due": dataclasses.asdict(snapshot.due),
        "best_scores": snapshot.best_scores,
        "last_scores": snapshot.last_scores,
        "ranks": [dataclasses.asdict(state) for state in snapshot.ranks],
        "run": run,
    }
    run_folder.write_json(folder / run_folder.STATE_FILE, dataclasses.asdict(snapshot.train))
    # Last: it is what a reader looks for first.
    run_folder.write_json(folder / TRAINING_STATE_FILE, content)


def read_training_state(folder: Path) -> SavedTraining:
    """The inverse of `write_training_state`. Raises CheckpointError where a file is missing, damaged, or of another version."""
    for name in (TRAINING_STATE_FILE, TENSORS_FILE, run_folder.STATE_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} cannot be resumed from: it has no {name}; name a checkpoint-<step> folder of a training run")
    try:
        content = _json(folder / TRAINING_STATE_FILE)
        train = TrainState(**_json(folder / run_folder.STATE_FILE))
        if content["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / TRAINING_STATE_FILE}: format_version is {content['format_version']!r}, this release reads {FORMAT_VERSION};"
                " use the release that wrote it"
            )
        snapshot = _snapshot(content, train, read_tensor_file(folder / TENSORS_FILE))
        return SavedTraining(snapshot, content["run"])
    except CheckpointError:
        raise  # it says what is wrong, and is a RuntimeError
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be resumed from: its training state is damaged ({type(error).__name__}: {error}); resume from another"
            " checkpoint"
        ) from error


@dataclasses.dataclass(frozen=True)
class Resumable:
    """The newest checkpoint that can be read and what it holds, or None; and why newer ones cannot be read, by folder."""

    checkpoint: Path | None
    saved: SavedTraining | None
    rejected: Mapping[Path, str]


def newest_resumable(folder: Path, examined: Iterable[Examined] | None = None) -> Resumable:
    """Look through a run's checkpoints, newest first: whole, with a training state, and every number of it finite.

    examined: what the store found already, newest first.
    """
    rejected: dict[Path, str] = {}
    for one in CheckpointStore(folder).examined() if examined is None else examined:
        path = one.checkpoint.path
        if one.problems:
            rejected[path] = "; ".join(one.problems)
            continue
        try:
            saved = read_training_state(path)
        except CheckpointError as error:
            rejected[path] = str(error)
        else:
            return Resumable(path, saved, rejected)
    return Resumable(None, None, rejected)


def _json(file: Path) -> Any:
    # Not `untrusted.read_json`: a metric may be no number (a correlation with a constant), and a long run's history outgrows its limit.
    return json.loads(file.read_text(encoding="utf-8"))


def _snapshot(content: Mapping[str, Any], train: TrainState, tensors: Mapping[str, Tensor]) -> Snapshot:
    by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*KINDS, _BEST)}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_kind[kind][name] = tensor
    best = by_kind.pop(_BEST)
    scale, last = content["loss_scale"], content["last_scores"]
    sums = Sums(**(content["sums"] | {"window": tuple(content["sums"]["window"])}))
    engine = EngineState(
        tensors=by_kind,
        steps=content["steps"],
        global_step=content["global_step"],
        skipped_steps=content["skipped_steps"],
        skipped_in_a_row=content["skipped_in_a_row"],
        loss_scale=LossScaleState(**scale) if scale else None,
    )
    ranks = [
        RankState(state["random"], {name: tuple(value) for name, value in state["unlogged"].items()}, state["spikes"])
        for state in content["ranks"]
    ]
    if not ranks:
        raise ValueError("it holds the state of no rank")
    for rank in ranks:
        check_rank(rank)
    return Snapshot(
        engine=engine,
        train=train,
        sums=sums,
        due=Due(**content["due"]),
        best=best or None,
        best_scores=content["best_scores"],
        last_scores=(int(last[0]), last[1]) if last else None,
        ranks=ranks,
    )


class BackgroundWriter:
    """Writes one checkpoint at a time beside the training. Memory is bounded: the next one waits until the one before is written."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def close(self) -> None:
        """Let the write under way end, and take no other one."""
        self._thread.shutdown()

    def submit(self, write: Callable[[], None]) -> None:
        """Write soon. Raises what the write before raised."""
        self.wait()
        self._pending = self._thread.submit(write)

    def settle(self) -> None:
        """Wait for the write under way, if there is one; what it raised is left for `wait`."""
        pending = self._pending  # another thread may be in `wait`
        if pending is not None:
            wait([pending])

    def wait(self) -> None:
        """Wait for the write under way, if there is one, and raise what it raised."""
        pending = self._pending
        if pending is not None:
            try:
                pending.result()
            finally:
                self._pending = None  # only now: until it is written, `settle` must find it
