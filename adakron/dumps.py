"""A step that went wrong, kept in one file: the batch, the trained parameters of that moment, where the step stood, how the run was set.

Safetensors with a JSON text beside the tensors: nothing in it is code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adakron.atomic import publish
from adakron.errors import CheckpointError
from adakron.passes import ForwardPass
from adakron.tasks.base import Batch
from adakron.untrusted import UnreadableError, parse_json

_KEY = "adakron_step"
_FORMAT = 1


@dataclass(frozen=True)
class StepDump:
    """One rank's share of a global step.

    number: of the step, from 1, as logs count. targets: valid ones of the whole step, on all ranks. places, batches: its micro-batches.
    parameters: what trains, whole and in fp32. run: what `launch/` needs to build the model again.
    """

    number: int
    rank: int
    world_size: int
    targets: int
    places: list[ForwardPass]
    batches: list[Batch]
    parameters: Mapping[str, Tensor]
    run: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's name."""
        return f"nonfinite-step{self.number}-rank{self.rank}.safetensors"


def write_dump(dump: StepDump, file: Path) -> None:
    """Write the file, whole or not at all. The folder must exist."""
    tensors = {f"parameter.{name}": tensor.contiguous() for name, tensor in dump.parameters.items()}
    for index, batch in enumerate(dump.batches):
        tensors |= {f"batch.{index}.{name}": tensor.cpu().contiguous() for name, tensor in batch.items()}
    content = {
        "format": _FORMAT,
        "number": dump.number,
        "rank": dump.rank,
        "world_size": dump.world_size,
        "targets": dump.targets,
        "places": [_place(place) for place in dump.places],
        "run": dict(dump.run),
    }
    with publish(file) as partial:
        # Not the library's own writing: it makes an error of its own kind of a full disk.
        partial.write_bytes(save(tensors, metadata={_KEY: json.dumps(content)}))


def _place(place: ForwardPass) -> dict[str, Any]:
    examples = np.asarray(place.examples).tolist()
    return {"step": place.step, "micro_step": place.micro_step, "examples": examples, "filler": place.filler}


def read_dump(file: str | Path) -> StepDump:
    """The inverse of `write_dump`. Raises CheckpointError where the file is no such thing."""
    what = f"{file} is not a step that a run wrote down (nonfinite-step*.safetensors)"
    if not Path(file).is_file():  # a pipe would be waited for
        raise CheckpointError(f"{what}: there is no such file")
    try:
        with safe_open(file, "pt") as opened:
            if _KEY not in (opened.metadata() or {}):
                raise CheckpointError(f"{what}: it says nothing of a step")
            content = parse_json(opened.metadata()[_KEY])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            written = content.get("format") if isinstance(content, dict) else content
            raise CheckpointError(f"{file}: format is {written!r}, this release reads {_FORMAT}; use the one that wrote it")
        return _dump(content, tensors)
    except (OSError, SafetensorError, UnreadableError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{what}: {type(error).__name__} {error}") from error


def _dump(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StepDump:
    parameters = {name.removeprefix("parameter."): tensor for name, tensor in tensors.items() if name.startswith("parameter.")}
    batches = [
        {name.removeprefix(f"batch.{index}."): tensor for name, tensor in tensors.items() if name.startswith(f"batch.{index}.")}
        for index in range(len(content["places"]))
    ]
    places = [ForwardPass(p["step"], p["micro_step"], 0, np.asarray(p["examples"], dtype=np.int64), p["filler"]) for p in content["places"]]
    return StepDump(
        content["number"], content["rank"], content["world_size"], content["targets"], places, batches, parameters, content["run"]
    )
