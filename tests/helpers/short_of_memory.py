"""launch/train.py on ranks that run out of memory, as the environment's LIMIT says, a JSON object:

{"mib": N}: once the engine stands, a rank's address space may grow by N MiB and no further.
{"rows": N, "rank": R, "where": "forward" or "backward", "step": S}: rank R (every rank without it) has torch.OutOfMemoryError raised in
the second layer, when the micro-batch has more than N rows and S optimizer steps are done (0 where it is left out).

deepspeed --module tests.helpers.short_of_memory FLAGS
"""

import json
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adakron import distributed
from adakron.engine.engine import TrainingEngine
from adakron.trainer import Trainer
from launch import train
from launch.program import execute

MIB = 2**20


def limit_address_space(mib: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mib * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fail_above(engine: TrainingEngine, model: nn.Module, limit: Mapping[str, Any]) -> None:
    rows = 0

    def count(module: nn.Module, args: Any, kwargs: Mapping[str, torch.Tensor]) -> None:
        nonlocal rows
        rows = len(kwargs["input_ids"])

    def check() -> None:
        if rows > limit["rows"] and engine.global_step >= limit.get("step", 0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a test's tensor")

    def fail(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if limit["where"] == "forward":
            check()
        elif args[0].requires_grad:
            args[0].register_hook(lambda gradient: check())

    model.register_forward_pre_hook(count, with_kwargs=True)
    model.get_submodule("bert.encoder.layer.1.output.dense").register_forward_pre_hook(fail)


def install(limit: Mapping[str, Any]) -> None:
    if "mib" in limit:
        fit = Trainer.fit_micro_batch

        def fit_within(trainer: Trainer) -> Any:
            limit_address_space(limit["mib"])
            return fit(trainer)

        Trainer.fit_micro_batch = fit_within  # type: ignore[method-assign]
        return
    build = TrainingEngine.__init__

    def build_failing(engine: TrainingEngine, model: nn.Module, *arguments: Any, **options: Any) -> None:
        build(engine, model, *arguments, **options)
        if limit.get("rank", distributed.rank()) == distributed.rank():
            fail_above(engine, model, limit)

    TrainingEngine.__init__ = build_failing  # type: ignore[method-assign]


if __name__ == "__main__":
    train.LISTENER.listen()
    install(json.loads(os.environ["LIMIT"]))
    execute(train.main)
