"""Memory that ran out: told from other errors, and given back."""

import gc

import torch

_SAID = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What a RuntimeError says where the host's allocator, the CUDA driver (for a kernel's code), or cuBLAS for itself, got no memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device or the host had no memory left for what was asked."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def give_back(device: torch.device) -> None:
    """Free what nothing refers to any more, on the host and on the device, beyond what the allocator keeps for later."""
    gc.collect()  # what a failed pass leaves behind may refer to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
