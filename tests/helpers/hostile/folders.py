"""Run folders, adapter folders and model folders in which one file was tampered with."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.fuzzing import pick
from tests.helpers.hostile import json_files
from tests.helpers.hostile.values import mutate
from tests.helpers.hostile.weights import SAFETENSORS, Touch, saved

ELSEWHERE = (
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "../",
    "~root",
    "\x1b[31m",
    "a\0b",
    "x" * 5000,
    "hf://x/y",
    "{pipe}",
    "{loop}",
)


def _points_elsewhere(content: Any, rng: np.random.Generator, folder: Path) -> Any:
    """The content with one of its texts replaced by the name of something else."""
    places: list[tuple[Any, Any]] = []
    level = [content]
    while level:
        value = level.pop()
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
        places += [(value, key) for key, inner in items if isinstance(inner, str) or inner is None]
        level += [inner for _, inner in items]
    if places:
        holder, key = pick(rng, places)
        holder[key] = pick(rng, (*ELSEWHERE, str(folder.parent / "pipe"), str(folder.parent / "loop")))
    return content


def tamper(rng: np.random.Generator, folder: Path, names: tuple[str, ...]) -> str:
    """Change one file of a folder, one of `names` (JSON or safetensors); what was done."""
    name = pick(rng, names)
    file = folder / name
    how = rng.random()
    if how < 0.1:
        return f"{name} is {_something_else(rng, file)}"
    if name.endswith(".safetensors"):
        kind = pick(rng, sorted(SAFETENSORS))
        file.write_bytes(SAFETENSORS[kind](rng, file.read_bytes()))
        return f"{name}: {kind}"
    if how < 0.25:
        kind = pick(rng, sorted(json_files.RAW))
        file.write_bytes(json_files.RAW[kind])
        return f"{name}: {kind}"
    content = json.loads(file.read_text())
    touched: list[str] = []
    if how < 0.4:
        os.mkfifo(folder.parent / "pipe")
        (folder.parent / "loop").symlink_to("loop")
        content = _points_elsewhere(content, rng, folder)
    else:
        content, touched = mutate(content, rng, int(rng.integers(1, 4)))
    file.write_text(json.dumps(content))
    return f"{name}: {', '.join(touched) or 'names elsewhere'}"


def _something_else(rng: np.random.Generator, file: Path) -> str:
    content = file.read_bytes()
    file.unlink()
    kind = pick(rng, ("missing", "pipe", "loop", "folder", "link to device", "link", "pickle", "bin"))
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "folder":
        file.mkdir()
    elif kind == "link to device":
        file.symlink_to("/dev/zero")
    elif kind == "link":
        (file.parent.parent / "target").write_bytes(content)
        file.symlink_to(file.parent.parent / "target")
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Touch()))
    elif kind == "bin":
        for name in ("adapter_model.bin", "pytorch_model.bin"):
            (file.parent / name).write_bytes(saved(Touch()) if rng.random() < 0.5 else pickle.dumps(Touch()))
    return kind
