"""Checkpoint files of the published codes on disk: read without running anything in them, written whole or not at all."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adakron.atomic import publish
from adakron.errors import CheckpointError, ConfigError
from adakron.placement import some_of
from adakron.pretrained import reason_of

STATE_KEY = "model_state_dict"
"""Key of the tensors in the files of the text-generation code (`NLG/src/gpt2_ft.py:265-268`)."""

DDP_PREFIX = "module."
"""What DistributedDataParallel puts before every name; the text-generation code loads files with it only."""


def read_tensors(file: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file by name, without DistributedDataParallel's prefix, and whether they had it.

    Raises CheckpointError where the file cannot be read, or holds anything but tensors by name. No code in it runs.
    """
    content = _load(file)
    if isinstance(content, Mapping) and STATE_KEY in content:
        others = [str(key) for key in content if key != STATE_KEY]
        if others:
            raise CheckpointError(f"{file} holds {', '.join(map(repr, others[:8]))} beside {STATE_KEY!r}, which no published code writes")
        content = content[STATE_KEY]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; a checkpoint of the published codes is a dict of tensors by name")
    wrong = [f"{key!r} ({type(value).__name__})" for key, value in content.items() if not _is_entry(key, value)]
    if wrong:
        raise CheckpointError(f"{file} holds {len(wrong)} entries that are no tensors by name: {', '.join(wrong[:8])}")
    problems = [f"{key} {problem}" for key, tensor in content.items() if (problem := _tensor_problem(tensor))]
    if problems:
        raise CheckpointError(f"{file} holds tensors that no training leaves: {some_of(problems)}")
    prefixed = bool(content) and all(key.startswith(DDP_PREFIX) for key in content)
    return {key.removeprefix(DDP_PREFIX) if prefixed else key: tensor for key, tensor in content.items()}, prefixed


def _tensor_problem(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        return "is no ordinary tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has shape {tuple(tensor.shape)} over {tensor.untyped_storage().nbytes():,} bytes, repeating them"
    return "" if tensor.isfinite().all() else "has values that are not finite"


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _load(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file} is no file; name a pytorch_model_expert_soup.bin, a model.final.pt or a model.<step>.pt")
    _check_archive(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named[1]}, and tensors by name is all that is read" if named else "it is damaged or no checkpoint of PyTorch's"
        raise CheckpointError(f"cannot read {file}: {what}; nothing in it was run") from error
    # A damaged archive raises whatever the reader stumbled over.
    except Exception as error:
        raise CheckpointError(f"cannot read {file}, it is damaged or no checkpoint of PyTorch's: {reason_of(error)}") from error


def _check_archive(file: Path) -> None:
    """Compare the checksums that PyTorch writes and does not read; files of its older, unzipped form have none."""
    damaged = None
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
                if packed:
                    raise CheckpointError(f"{file} holds compressed entries ({packed[0]}), which PyTorch does not write; fetch it again")
                damaged = archive.testzip()
        except CheckpointError:
            raise
        except Exception as error:  # whatever the reader stumbled over
            raise CheckpointError(f"cannot read {file}, it is damaged: {reason_of(error)}") from error
    if damaged is not None:
        raise CheckpointError(f"{file} is damaged: the checksum of its entry {damaged} is wrong; fetch the file again")


def write_checkpoint(content: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint; a reader sees it whole or not at all. Raises ConfigError where the file exists."""
    if file.exists():
        raise ConfigError(f"--output_file {file} exists; name another file, or delete it")
    file.parent.mkdir(parents=True, exist_ok=True)
    with publish(file) as partial:
        torch.save(dict(content), partial)
