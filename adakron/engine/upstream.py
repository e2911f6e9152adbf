"""What DeepSpeed must be told, or spared, before it starts. Each function names the upstream behaviour it works around."""

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from adakron.log import get_logger

logger = get_logger(__name__)

STALE_AFTER_SECONDS = 600
"""A build of a DeepSpeed operator takes up to 3 minutes on two busy cores; a lock ten minutes old has no builder left."""


def keep_builds_in_environment() -> None:
    """Send PyTorch's run-time builds into the Python environment's own folder, unless TORCH_EXTENSIONS_DIR says where.

    The default folder is shared by all environments of a user: two of them rebuild each other's operators.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def stale_build_locks(folder: Path, now: float) -> list[Path]:
    """Lock files that a killed build left under a TORCH_EXTENSIONS_DIR: every later build waits on them for ever, silently."""
    found = []
    for lock in folder.glob("**/lock"):
        try:
            if now - lock.stat().st_mtime > STALE_AFTER_SECONDS:
                found.append(lock)
        except FileNotFoundError:  # a live build just finished
            continue
    return sorted(found)


def ready_deepspeed(device: torch.device) -> None:
    """Prepare DeepSpeed's communication on the process group that already exists. No operator is compiled.

    On a CPU `deepspeed.init_distributed` would build a shared-memory operator (30-75 s, a compiler and ninja needed) that
    only inference uses.
    """
    import deepspeed
    from deepspeed import comm

    keep_builds_in_environment()
    for lock in stale_build_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]), time.time()):
        logger.warning("%s is the lock of a build that was killed: any build there would wait for ever; delete it", lock)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)


@contextlib.contextmanager
def quiet_initialisation() -> Iterator[None]:
    """Swallow the memory reports that DeepSpeed's bf16 stage-1 optimizer prints unconditionally while it is built."""
    reports = logging.getLogger("DeepSpeed")
    level = reports.level
    reports.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        reports.setLevel(level)
