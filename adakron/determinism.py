"""--deterministic: the same command on the same machine computes the same bits.

The order of data, initial values, experts and dropout depend on the seed alone. What may still differ between two runs is the order
in which a GPU adds, where a kernel uses atomic additions or is chosen by a race between candidates.
"""

import os

import torch

from adakron.errors import ConfigError

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"

_CUBLAS_CHOICES = (":4096:8", ":16:8")
"""What cuBLAS computes reproducibly with (NVIDIA's cuBLAS documentation, "Results reproducibility"); 24 and 0.1 MiB."""


def compute_deterministically() -> None:
    """Deterministic kernels only, from here on; an operation that has none raises. Before anything touches a GPU.

    Raises ConfigError where CUBLAS_WORKSPACE_CONFIG is set to something else, or a GPU is in use already.
    """
    given = os.environ.setdefault(CUBLAS_VARIABLE, _CUBLAS_CHOICES[0])
    if given not in _CUBLAS_CHOICES:
        raise ConfigError(
            f"deterministic is set, but {CUBLAS_VARIABLE} is {given!r}; unset it, or set it to {' or '.join(_CUBLAS_CHOICES)}"
        )
    if torch.cuda.is_initialized():
        raise ConfigError("deterministic is set, but CUDA runs already; call compute_deterministically before anything touches a GPU")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
