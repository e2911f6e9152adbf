"""Passes that a rank makes by itself, for the memory they take: no rank waits for another in them, and they leave no trace.

Where one rank runs out of memory in the middle of a pass, the others would wait for it in a collective for ever. Below ZeRO-3 a pass
whose gradients are handed out has none. At ZeRO-3 modules gather their weights: here zeros of the same size stand in for them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.comm import comm
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from adakron.engine.ds_config import DeepSpeedSettings

SPARE_BYTES = 2**28
"""Held while a rank rehearses, for what a process takes later beside tensors and in their fragments: on a host, memory of threads (64 MiB
each), on a GPU buffers of NCCL.
"""


@contextlib.contextmanager
def alone(module: nn.Module, optimizer: Any, stage: int) -> Iterator[None]:
    """Inside, passes of the bare module need no other rank, and may fail at any point. optimizer: DeepSpeed's."""
    if stage < 3:
        yield
        return
    depth = len(parameter_offload.FWD_MODULE_STACK)
    with _nothing_gathered():
        try:
            _discover_external(module, True)  # as DeepSpeed's own call does around a forward pass
            yield
        finally:
            _discover_external(module, False)
            del parameter_offload.FWD_MODULE_STACK[depth:]
            _forget_walk(module, optimizer._get_param_coordinator())


class _Done:
    """The handle of a collective that is over."""

    def wait(self) -> None: ...

    def is_completed(self) -> bool:
        return True


def _zeros(output_tensor: Tensor, *_: Any, **__: Any) -> _Done:
    """In an all-gather's place. Written to, as by the true one: the host hands out memory at the first write."""
    output_tensor.zero_()
    return _Done()


@contextlib.contextmanager
def _in_place_of(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:  # it was the class's
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _nothing_gathered() -> Iterator[None]:
    backend, coordinator = comm.cdb, partitioned_param_coordinator
    with contextlib.ExitStack() as replaced:
        # The one collective of DeepSpeed's that gathers weights.
        replaced.enter_context(_in_place_of(backend, "all_gather_into_tensor", _zeros))
        # Compares the order of modules with that of other ranks, one of which may have failed on its way.
        replaced.enter_context(_in_place_of(coordinator, "assert_ints_same_as_other_ranks", lambda _: None))
        yield


def _discover_external(module: nn.Module, on: bool) -> None:
    for part in module.modules():
        part._parameters._in_forward = on  # type: ignore[attr-defined]  # DeepSpeed's own kind of dictionary


@torch.no_grad()
def _forget_walk(module: nn.Module, coordinator: Any) -> None:
    """Partition every parameter again, wherever the walk through the modules ended, and let the next walk be the first one.

    DeepSpeed resets what else it counts at the beginning of a walk.
    """
    coordinator.release_backward_leftovers()
    for part in module.modules():
        part.applied_pre_backward_ref_cnt = 0  # type: ignore[assignment]
        part.ds_recompute_parameters.clear()  # type: ignore[operator, union-attr]
    module.ds_inflight_param_registry.clear()  # type: ignore[operator, union-attr]
    for parameter in module.parameters():
        if parameter.ds_status == ZeroParamStatus.INFLIGHT:  # type: ignore[attr-defined]
            # On its way when memory ran out. Nothing needs to arrive: it goes like those that did.
            parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    coordinator.release_and_reset_all(module)
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def step_bytes(trainable: int, settings: DeepSpeedSettings, world_size: int) -> int:
    """What an optimizer step takes at most beside its passes, in bytes per rank. trainable: elements.

    In fp32: the gradient that is summed, and its copy that is reduced; of the optimizer two states, their update and its gradient,
    which ZeRO deals out to the ranks.
    """
    owners = world_size if settings.stage else 1
    return 4 * (2 * trainable + 4 * -(-trainable // owners))
