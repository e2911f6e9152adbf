"""Kernels in C++ for CPUs (`csrc/`): compiled once per machine, kept, loaded. Where there is no compiler, torch computes.

They know memory and sizes alone; `fused.py` and `dropout.py` call them on tensors.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from adakron.atomic import publish
from adakron.errors import ConfigError

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of the tensors that kernels take, and how a kernel's name ends."""

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_SECONDS = 120
"""A compiler is given: it takes about three."""

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_NOISE = (_POINTER, _INT, _FLOAT)  # columns, limit, scale
_TEXTS = (_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, *_NOISE, _FLOAT)
_ARGUMENTS = {
    "dropout": (_POINTER, _POINTER, *_NOISE, _POINTER, _SIZE, _SIZE),
    "add_norm": (_POINTER, _POINTER, _POINTER, *_NOISE, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE),
    "add_norm_backward": (_POINTER, _POINTER, _POINTER, _POINTER, *_NOISE, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE),
    "attention": (*_TEXTS, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER),
    "attention_backward": (
        *_TEXTS, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE,
    ),
}  # fmt: skip
_UNTYPED_ARGUMENTS = {"row_keys": (_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE)}


class _State:
    """library: what is loaded. problem: why nothing could be."""

    library: ctypes.CDLL | None = None
    problem: str | None = None


def load() -> str | None:
    """Let kernels compute from here on, in this process; why they cannot, where they cannot. Compiles them where nobody did before.

    The compiler is $CXX, else g++. The library is kept in $TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions, under a name that
    tells source, compiler and processor.
    """
    if _State.library is None and _State.problem is None:
        try:
            _State.library = _declared(ctypes.CDLL(str(_built())))
        # AttributeError: a library without the functions. RuntimeError: a user without a home folder.
        except (AttributeError, ConfigError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            _State.problem = _reason(error)
    return _State.problem


def unload() -> None:
    """Let torch compute again."""
    _State.library = _State.problem = None


def takes(x: Tensor) -> bool:
    """Whether kernels are loaded and compute with such a tensor."""
    return _State.library is not None and x.device.type == "cpu" and x.dtype in TYPES


def call(name: str, dtype: torch.dtype | None, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel. Tensors must be contiguous, or are given by their first element where the kernel knows a stride."""
    assert _State.library is not None
    function = getattr(_State.library, f"adakron_{name}" + (f"_{TYPES[dtype]}" if dtype is not None else ""))
    function(*(one.data_ptr() if isinstance(one, Tensor) else one for one in arguments))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    typed = {f"{name}_{ending}": types for name, types in _ARGUMENTS.items() for ending in TYPES.values()}
    for name, types in (typed | _UNTYPED_ARGUMENTS).items():
        function = getattr(library, f"adakron_{name}")
        function.argtypes, function.restype = types, None
    return library


def _built() -> Path:
    compiler = _compiler()
    sources = {file.name: file.read_bytes() for file in resources.files(__package__).joinpath("csrc").iterdir()}
    # Home folders are shared by machines of several kinds: what `native` means here is part of the name.
    target = _said(*compiler, "-march=native", "-Q", "--help=target") + _said(*compiler, "--version")
    key = hashlib.sha256(
        b"\0".join([*(sources[name] for name in sorted(sources)), target, " ".join((*compiler, *_FLAGS)).encode()])
    ).hexdigest()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = root / "adakron" / f"kernels-{key[:16]}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in sources.items():
                (Path(folder) / name).write_bytes(content)
            texts = [str(Path(folder) / name) for name in sorted(sources) if name.endswith(".cpp")]
            with publish(library) as partial:
                _said(*compiler, *_FLAGS, *texts, "-o", str(partial))
                if not partial.is_file():
                    raise ConfigError(f"{compiler[0]} made no library (name a compiler in $CXX)")
    return library


def _compiler() -> list[str]:
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named) or ["g++"]
    except ValueError as error:
        raise ConfigError(f"$CXX is {named}, which is no command line ({error}); quote it as for a shell") from error
    if shutil.which(words[0]) is None:
        raise ConfigError(f"no compiler {words[0]} (install g++, or name one in $CXX)")
    return words


def _said(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL).stdout


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        # The first lines may only say which file includes which.
        said = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {error.returncode}")
        return f"{error.cmd[0]} failed: {said}"
    return str(error)
