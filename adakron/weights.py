"""Parameters as they were before ZeRO stage 3 took them apart: shapes, sizes, and values gathered from all ranks.

DeepSpeed leaves a partitioned parameter empty, of shape (0,), and hangs on it what it needs to gather it; that is all that is
used here, so nothing imports DeepSpeed. A parameter that is whole is taken as it is.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A run's precision as torch names it."""


def shape(parameter: Tensor) -> tuple[int, ...]:
    """The whole parameter's shape."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def size(parameter: Tensor) -> int:
    """The whole parameter's number of elements."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO stage 3 has taken the parameter apart, even if it is gathered at the moment."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the parameters are whole on every rank, to be read; what is written to them is lost.

    Where one is partitioned, all ranks must come here together and with the same parameters, also where one of them fails.
    """
    # Those that are whole at the moment (another gathering, a forward pass) stay so for whoever gathered them.
    apart: list[Any] = [parameter for parameter in parameters if is_partitioned(parameter) and parameter.numel() != size(parameter)]
    if apart:
        apart[0].all_gather(param_list=apart)
    try:
        yield
    finally:
        if apart:
            apart[0].partition(param_list=apart, has_been_updated=False)
