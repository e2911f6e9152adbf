"""Files of weights that lie about themselves, or would run something: safetensors, pickles, archives."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from tests.helpers.fuzzing import pick
from tests.helpers.hostile.values import plain


class Touch:
    """Whoever unpickles this makes a file called `owned` in the working directory."""

    def __reduce__(self) -> Any:
        return (open, ("owned", "w"))


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; length: what it says of its header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(rng: np.random.Generator, content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    header, data = split(content)
    key = pick(rng, [name for name in header if name != "__metadata__"])
    change(header[key])
    return joined(header, data)


def flipped(rng: np.random.Generator, content: bytes) -> bytes:
    """With one byte inverted."""
    position = int(rng.integers(len(content)))
    return content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]


def _renamed(rng: np.random.Generator, content: bytes) -> bytes:
    header, data = split(content)
    key = pick(rng, [name for name in header if name != "__metadata__"])
    header[pick(rng, ("../../owned", "/etc/passwd", "", "\x1b[31m", key + ".x", "x" * 100_000, "base_model.model.x"))] = header.pop(key)
    return joined(header, data)


def _tensors(rng: np.random.Generator, content: bytes, change: Callable[[Tensor], Tensor]) -> bytes:
    tensors = safetensors.torch.load(content)
    key = pick(rng, sorted(tensors))
    tensors[key] = change(tensors[key]).contiguous()
    return safetensors.torch.save(tensors)


DTYPES = ("F64", "I8", "U32", "C64", "x", "F8_E4M3", "BF16", "BOOL")

SAFETENSORS: dict[str, Callable[[np.random.Generator, bytes], bytes]] = {
    "empty": lambda rng, content: b"",
    "short": lambda rng, content: content[: int(rng.integers(1, 60))],
    "truncated": lambda rng, content: content[: int(rng.integers(60, len(content)))],
    "longer": lambda rng, content: content + bytes(int(rng.integers(1, 1000))),
    "noise": lambda rng, content: rng.bytes(int(rng.integers(1, 4000))),
    "flipped": lambda rng, content: flipped(rng, content),
    "huge header": lambda rng, content: joined(*split(content), length=2**62),
    "header of 90 MB": lambda rng, content: joined(*split(content), length=90 * 2**20),
    "header is a list": lambda rng, content: joined([], b""),
    "header is empty": lambda rng, content: joined({}, b""),
    "header is deep": lambda rng, content: joined(b'{"a":' * 5000, b""),
    "overlapping": lambda rng, content: _entry(rng, content, lambda entry: entry.update(data_offsets=[0, 4], shape=[1])),
    "negative": lambda rng, content: _entry(rng, content, lambda entry: entry.update(data_offsets=[-4, 0])),
    "beyond": lambda rng, content: _entry(rng, content, lambda entry: entry.update(data_offsets=[2**40, 2**40 + 4], shape=[1])),
    "overflow": lambda rng, content: _entry(rng, content, lambda entry: entry.update(shape=[2**33, 2**33])),
    "any value": lambda rng, content: _entry(rng, content, lambda entry: entry.update({pick(rng, sorted(entry)): plain(rng)})),
    "dtype": lambda rng, content: _entry(rng, content, lambda entry: entry.update(dtype=pick(rng, DTYPES))),
    "no shape": lambda rng, content: _entry(rng, content, lambda entry: entry.pop("shape")),
    "renamed": _renamed,
    "metadata": lambda rng, content: joined({**split(content)[0], "__metadata__": plain(rng)}, split(content)[1]),
    "nan": lambda rng, content: _tensors(rng, content, lambda t: torch.full_like(t, float("nan"))),
    "infinite": lambda rng, content: _tensors(rng, content, lambda t: torch.full_like(t, float("-inf"))),
    "other shape": lambda rng, content: _tensors(rng, content, lambda t: torch.zeros(*t.shape, 2)),
    "flat": lambda rng, content: _tensors(rng, content, lambda t: t.flatten()[:1]),
    "scalar": lambda rng, content: _tensors(rng, content, lambda t: torch.zeros(())),
    "no values": lambda rng, content: _tensors(rng, content, lambda t: torch.zeros(0, *t.shape)),
    "integers": lambda rng, content: _tensors(rng, content, lambda t: torch.zeros_like(t, dtype=torch.int64)),
    "booleans": lambda rng, content: _tensors(rng, content, lambda t: torch.zeros_like(t, dtype=torch.bool)),
    "complex": lambda rng, content: _tensors(rng, content, lambda t: torch.zeros_like(t, dtype=torch.complex64)),
    "halves": lambda rng, content: _tensors(rng, content, lambda t: t.half()),
    "pickle": lambda rng, content: pickle.dumps(Touch()),
}  # fmt: skip


def saved(content: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    sink = io.BytesIO()
    torch.save(content, sink, **options)
    return sink.getvalue()


def _bomb() -> bytes:
    """A checkpoint of a few hundred kilobytes whose storage is 200 MB of zeros."""
    source = saved({"bert.encoder.layer.0.x": torch.zeros(4)})
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(200_000_000) if name.endswith("data/0") else old.read(name))
    return sink.getvalue()


CHECKPOINTS: dict[str, Callable[[Mapping[str, Tensor]], bytes]] = {
    "pickle": lambda good: pickle.dumps(Touch()),
    "pickle protocol 0": lambda good: pickle.dumps(Touch(), 0),
    "pickle in an archive": lambda good: saved(Touch()),
    "pickle beside tensors": lambda good: saved({**good, "x": Touch()}),
    "old form": lambda good: saved(Touch(), _use_new_zipfile_serialization=False),
    "archive of zeros": lambda good: _bomb(),
    "stretched": lambda good: saved({name: torch.zeros(1).expand(2**34) for name in [*good][:2]}),
    "list": lambda good: saved([1, 2]),
    "nested": lambda good: saved({"model_state_dict": {"model_state_dict": dict(good)}}),
    "numbers": lambda good: saved(dict.fromkeys(good, 1.0)),
    "number keys": lambda good: saved(dict(enumerate(good.values()))),
    "empty": lambda good: b"",
    "empty dict": lambda good: saved({}),
    "names": lambda good: saved({f"../../{name}": tensor for name, tensor in good.items()}),
    "escapes": lambda good: saved({f"\x1b[31m{name}": tensor for name, tensor in good.items()}),
    "shapes": lambda good: saved({name: tensor.flatten()[:3] for name, tensor in good.items()}),
    "scalars": lambda good: saved({name: torch.zeros(()) for name in good}),
    "nan": lambda good: saved({name: torch.full_like(tensor, float("nan")) for name, tensor in good.items()}),
    "sparse": lambda good: saved({name: tensor.to_sparse() for name, tensor in good.items()}),
    "integers": lambda good: saved({name: tensor.int() for name, tensor in good.items()}),
    "large layer": lambda good: saved({name.replace("layer.0", "layer.99999999999"): tensor for name, tensor in good.items()}),
    "truncated": lambda good: saved(dict(good))[:-300],
    "text": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zip": lambda good: _zip_slip(),
}


def _zip_slip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("../../owned", b"x")
    return sink.getvalue()


def write_checkpoint(rng: np.random.Generator, file: Path, good: Mapping[str, Tensor]) -> str:
    """Write a hostile checkpoint of the published codes; what is wrong with it."""
    kind = pick(rng, sorted(CHECKPOINTS))
    content = CHECKPOINTS[kind](good)
    if rng.random() < 0.2 and content:
        content, kind = flipped(rng, content), f"{kind}, flipped"
    file.write_bytes(content)
    return kind
