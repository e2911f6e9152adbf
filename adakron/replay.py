"""A step that was written down, computed again in one process, with an eye on every module: where the first non-finite number appears."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adakron.dumps import StepDump
from adakron.passes import MicroBatchLoss
from adakron.tasks.base import to_device


def replay(model: nn.Module, losses: MicroBatchLoss, dump: StepDump, device: torch.device) -> list[str]:
    """What is not finite, each in a sentence, in the order of the computation; empty where all is finite.

    model: with the dump's parameters, in training mode, on the device. Micro-batches are computed until one is not finite.
    """
    found = [
        f"parameter {name} is not finite before anything is computed"
        for name, parameter in model.named_parameters()
        if not torch.isfinite(parameter).all()
    ]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for place, batch in zip(dump.places, dump.batches, strict=True):
        here = f"micro-batch {place.micro_step}"
        with _watched(model) as seen:
            loss, disagreement = losses.sums(to_device(batch, device), place)
            total = loss + losses.consistency_weight * disagreement
            if not torch.isfinite(total):
                seen.append(f"the loss is {total.item()}")
            (total * (dump.world_size / max(1, dump.targets))).backward()
        bad = [name for name, parameter in trained.items() if parameter.grad is not None and not torch.isfinite(parameter.grad).all()]
        seen += [f"the gradient of {bad[0]} is not finite, as are those of {len(bad) - 1} more of {len(trained)} parameters"] if bad else []
        if seen:
            return [*found, *(f"{here}: {what}" for what in seen)]
    return found


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Sees the first module whose output is not finite, and the first in the backward pass whose output's gradient is not."""
    seen: list[str] = []
    kinds: set[str] = set()

    def note(kind: str, what: str, tensor: Tensor) -> None:
        if kind not in kinds and not torch.isfinite(tensor).all():
            kinds.add(kind)
            seen.append(f"{what} is the first that is not finite ({_extent(tensor)})")

    def hook(name: str, module: nn.Module) -> Any:
        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                note("forward", f"in the forward pass the output of {name} ({type(module).__name__})", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: note("backward", f"in the backward pass the gradient after {name}", gradient))

        return module.register_forward_hook(after)

    handles = [hook(name or "the model", module) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _extent(tensor: Tensor) -> str:
    nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nan} NaN and {infinite} infinite of {tensor.numel()} values"
