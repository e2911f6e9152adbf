"""Safetensors files: reading what anybody may have written, and writing without a copy of it all."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from adakron.errors import CheckpointError

_SHOWN = 8
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_tensor_file(path: str | Path, *, integers: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, by name.

    Raises CheckpointError where it is no regular file (a pipe would be waited for), is damaged, or holds what no training leaves:
    values that are not finite, or no floating-point numbers unless integers allows them (indices of some of PEFT's methods).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file; it must be a safetensors file (restore it from where it came from)")
    try:
        stored: dict[str, Tensor] = safetensors.torch.load_file(path)
    # Beside its own errors the library passes on what torch says of a shape or type.
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot read {path}: {reason}; the file is damaged, restore it from where it came from") from error
    wrong = [f"{name} ({str(tensor.dtype).removeprefix('torch.')})" for name, tensor in stored.items() if not tensor.is_floating_point()]
    if wrong and not integers:
        raise CheckpointError(f"{path} holds {_some(wrong)}; adapters and heads are floating-point numbers")
    # float32: some eight-bit types cannot be asked whether they are finite.
    wrong = [name for name, tensor in stored.items() if tensor.is_floating_point() and not tensor.float().isfinite().all()]
    if wrong:
        raise CheckpointError(f"{path} holds values that are not finite, in {_some(wrong)}; a run that ended so is not worth loading")
    return stored


def write_tensor_file(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write floating-point tensors of the CPU as a safetensors file, one after another: no more than one of them is copied.

    The library's `save` makes a copy of all, its `save_file` a file that nobody but its owner can read. Layout: eight bytes, little
    endian, with the header's length; the header, JSON; the values, row by row, little endian as the machine is.
    Raises OSError where the disk says so.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values lie aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
