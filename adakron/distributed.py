"""The process group, this rank's device, and the few collectives that the rest of the code needs.

Every helper does nothing, or the obvious local thing, in a single process, so no caller asks how many ranks there are.
"""

import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from adakron import peers
from adakron.errors import AdaKronError, ConfigError
from adakron.launcher import World
from adakron.log import keep

T = TypeVar("T")
DEFAULT_TIMEOUT = timedelta(minutes=30)

EXIT_LOST_RANK = 76
"""Exit code of a rank that ends because another one was lost: the cause is elsewhere."""

_watch: peers.PeerWatch | None = None


def select_device(world: World, environ: Mapping[str, str]) -> torch.device:
    """This rank's GPU, or the CPU where there is none or DS_ACCELERATOR=cpu asks for it."""
    if environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_world_size > count:  # every rank of the host sees it, so none waits for the others
        hidden = "; of Slurm ask for them by node (--gpus-per-node), not by task" if "SLURM_JOB_ID" in environ and count == 1 else ""
        raise ConfigError(f"{world.local_world_size} processes on a host with {count} GPUs; start at most {count} per host{hidden}")
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def form_group(world: World, device: torch.device, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Form the process group (gloo on CPUs, NCCL and gloo on GPUs). One process gets a group of its own on a free port.

    timeout: how long a collective waits for the other ranks, in this group and in every later one.
    """
    if dist.is_initialized():
        return
    # DeepSpeed makes groups of its own, which carry most of the traffic, and gives them no timeout: they take torch's defaults.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    # Of a place to meet, one process needs all or nothing: half of it was left over in its shell.
    if world.world_size == 1 and not ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)
        # DeepSpeed reads these even where the group exists already.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1, timeout=timeout)
        return
    # DeepSpeed insists on these also where another launcher named them differently.
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(world.local_rank))
    try:
        dist.init_process_group(_backend(device), rank=world.rank, world_size=world.world_size, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']}, where the ranks are to meet, is taken by another program;"
            " give another one: MASTER_PORT, or --master_port of deepspeed and torchrun"
        ) from error
    if world.world_size > 1:
        global _watch
        _watch = peers.PeerWatch(*peers.address(), world.rank, world.world_size, _end_for_lost_rank)


def peer_watch() -> peers.PeerWatch | None:
    """What this rank knows of the others; None in a single process, and before the group is formed."""
    return _watch


def _end_for_lost_rank(reason: str) -> None:
    # The main thread stands in something that does not end: nothing of it can be cleaned up.
    text = f"error: rank {rank()} ends because another rank was lost: {reason}"
    print(text, file=sys.stderr, flush=True)
    keep(text)
    os._exit(EXIT_LOST_RANK)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def leave_group() -> None:
    """Leave the process group, if there is one. All ranks together: with a lost one this may wait for ever."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks; 1 where no group was formed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 where no group was formed."""
    return dist.get_rank() if dist.is_initialized() else 0


def _alone() -> bool:
    return world_size() == 1


def barrier() -> None:
    """Wait until every rank is here."""
    if not _alone():
        # An all-reduce of one number on the host: NCCL's own barrier would guess the device.
        dist.all_reduce(torch.zeros(1))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of the tensor over all ranks, in place and returned."""
    if not _alone():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum of the tensor over all ranks, in place and returned."""
    if not _alone():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if _alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if _alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(function: Callable[[], T]) -> T:
    """What the function returns on rank 0, or the AdaKronError or OSError it raises there, on every rank."""
    outcome: tuple[T | None, AdaKronError | OSError | None] | None = None
    if rank() == 0:
        try:
            outcome = function(), None
        except (AdaKronError, OSError) as error:
            outcome = None, error
    value, failure = broadcast_object(outcome)
    if failure is not None:
        raise failure
    result: T = value
    return result
