"""Training metrics: kept on the device, reduced over ranks once per interval, written by rank 0 to files and TensorBoard."""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from adakron import distributed
from adakron.atomic import publish

Reduce = Literal["sum", "same", "max", "last"]
"""How one step's values of several ranks become one: added, equal on all ranks anyway (last: and of the newest step), the largest."""


Unlogged = Mapping[str, tuple[Reduce, list[float]]]
"""A rank's recorded values since the last flush, one a step, by the metric's name and with its reduction."""


class Sink(Protocol):
    """Where reduced metrics go. Exists on rank 0 only."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """values by name, such as "train/loss", at a global step."""

    def close(self) -> None:
        """Write out what is buffered."""


class TensorBoardSink:
    """Scalars for TensorBoard; the x axis is the global step."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        """purge_step: TensorBoard forgets what the folder's older files say of this step and later ones; for a resumed run."""
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class JsonLinesSink:
    """One JSON object per write, for programs: {"step": 10, "train/loss": 0.6, ...}."""

    def __init__(self, file: Path, last_step: int | None = None, *, evaluates_again: bool = False):
        """last_step: drop what the file says of later steps, and half a line at its end; for a resumed run.

        evaluates_again: drop the evaluation of last_step, too, for it will be made once more.
        """
        if last_step is not None and file.exists():
            kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
            if evaluates_again:
                kept = [line for line in kept if _step_of(line) < last_step or any(name.startswith("train/") for name in json.loads(line))]
            with publish(file) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file: TextIO = file.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append and flush one line: a run that dies leaves its metrics."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class MetricRecorder:
    """Collects values step by step without waiting for the device, and reduces them once per interval.

    A metric's value for an interval is the mean over the recorded steps of the value reduced over ranks (the maximum for
    "max", the newest for "last"). All ranks must record the same names and flush together.
    """

    def __init__(self, sinks: Sequence[Sink] = ()):
        self._sinks = list(sinks)
        self._values: dict[str, list[Tensor]] = {}
        self._reduce: dict[str, Reduce] = {}

    def record(self, name: str, value: Tensor | float, reduce: Reduce = "same") -> None:
        """Keep a scalar of this step. Tensors stay where they are."""
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        self._values.setdefault(name, []).append(tensor)
        self._reduce[name] = reduce

    def flush(self) -> dict[str, float]:
        """The interval's reduced values, equal on every rank; starts a new interval."""
        names = sorted(self._values)
        local = {}
        for name, stacked in self._on_host().items():
            kind = self._reduce[name]
            local[name] = stacked.max() if kind == "max" else stacked[-1] if kind == "last" else stacked.mean()
        totals = self._over_ranks(local, "sum", distributed.all_reduce_sum)
        maxima = self._over_ranks(local, "max", distributed.all_reduce_max)
        self._values.clear()
        return {name: float((totals | maxima).get(name, local[name])) for name in names}

    def _over_ranks(self, local: Mapping[str, Tensor], kind: Reduce, collective: "_Collective") -> dict[str, Tensor]:
        names = [name for name in local if self._reduce[name] == kind]
        if not names:
            return {}
        return dict(zip(names, collective(torch.stack([local[name] for name in names])), strict=True))

    def unlogged(self) -> Unlogged:
        """This rank's values since the last flush, for a checkpoint between two log lines. Waits for the device."""
        return {name: (self._reduce[name], values.tolist()) for name, values in self._on_host().items()}

    def _on_host(self) -> dict[str, Tensor]:
        counts = [len(values) for values in self._values.values()]
        flat = on_host([value for values in self._values.values() for value in values])
        return dict(zip(self._values, flat.split(counts) if counts else (), strict=True))

    def restore(self, unlogged: Unlogged) -> None:
        """Take up an interval where `unlogged` left it."""
        for name, (reduce, values) in unlogged.items():
            self._reduce[name] = reduce
            self._values[name] = [torch.tensor(value, dtype=torch.float64) for value in values]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send values to every sink."""
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def on_host(scalars: Sequence[Tensor]) -> Tensor:
    """The scalars in fp64 on the host, in their order. It waits for a device once, however many of its values there are."""
    collected = torch.zeros(len(scalars), dtype=torch.float64)
    for device in {scalar.device for scalar in scalars}:
        places = [place for place, scalar in enumerate(scalars) if scalar.device == device]
        collected[places] = torch.stack([scalars[place].double() for place in places]).cpu()
    return collected


def share_unlogged(ranks: Sequence[Unlogged], rank: int) -> Unlogged:
    """The values of several ranks dealt out to another number of them, so that reducing them gives what it would have given."""
    shared = {}
    for name, (reduce, values) in ranks[0].items():
        if reduce == "sum":
            values = [sum(step) for step in zip(*(other[name][1] for other in ranks), strict=True)] if rank == 0 else [0.0] * len(values)
        elif reduce == "max":
            values = [max(step) for step in zip(*(other[name][1] for other in ranks), strict=True)]
        shared[name] = (reduce, values)
    return shared


class _Collective(Protocol):
    def __call__(self, tensor: Tensor) -> Tensor: ...


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory of this rank so far, in MiB: allocated on a GPU, resident on a host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
