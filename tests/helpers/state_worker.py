"""Saves and loads engine states of every ZeRO stage, many in one launch, on tensors whose sizes no number of ranks divides.

Started as `deepspeed --module tests.helpers.state_worker FOLDER save|load ...`. `save` trains every stage and precision for SAVED_AT
steps, writes its state, and goes on to STEPS; `load` starts each from every state in the folder and goes on to STEPS. Rank 0
writes what each case ended with.
"""

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from adakron import distributed
from adakron.config import TrainingConfig
from adakron.engine import ds_config
from adakron.engine.engine import TrainingEngine
from adakron.engine.state import EngineState
from adakron.launcher import World
from launch.program import execute

SAVED_AT, STEPS = 3, 6
GLOBAL_BATCH = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = [(precision, stage) for precision in DTYPES for stage in range(4) if stage or precision == "fp32"]
"""Stage 0 trains wrongly in 16 bit, and is refused."""


class OddModel(nn.Module):
    """Sizes 35, 5, 15, 3 and 1 train, with weight decay and without; a layer between them is frozen."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down, self.frozen, self.up = nn.Linear(7, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.gate = nn.Parameter(torch.ones(1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.frozen.weight.data = torch.eye(5)
        self.frozen.bias.data.zero_()
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.frozen(torch.tanh(self.down(inputs)))
        return self.up(hidden * self.gate)


def build(stage: int, precision: str, seed: int, device: torch.device) -> TrainingEngine:
    """An engine of that layout whose parameters, until a state is loaded, are the seed's."""
    training = TrainingConfig(
        per_device_train_batch_size=GLOBAL_BATCH // distributed.world_size(), max_steps=STEPS, learning_rate=5e-2, weight_decay=0.1,
        lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=1.0,
    )  # fmt: skip
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 10  # some parameters lie whole on every rank, some in parts
    source: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}}
    if precision == "fp16":
        # A scale that overflows at first, and grows again soon after.
        source["fp16"] = {"enabled": True, "initial_scale_power": 21, "loss_scale_window": 3, "hysteresis": 1}
    values = ds_config.RunValues(
        micro_batch=training.per_device_train_batch_size, accumulation=1, world_size=distributed.world_size(), max_grad_norm=1.0
    )
    model = OddModel(seed)
    groups = [
        {"params": [model.down.weight, model.up.weight], "weight_decay": 0.1},
        {"params": [model.down.bias, model.up.bias, model.gate], "weight_decay": 0.0},
    ]
    return TrainingEngine(model, groups, ds_config.resolve(source, values), training, total_steps=STEPS, device=device)


def train(engine: TrainingEngine, until: int, world: World) -> None:
    """Steps up to a number of them: every step has the same examples whatever the number of ranks."""
    dtype = DTYPES[engine.precision]
    for attempt in itertools.count():
        if engine.global_step == until:
            return
        assert attempt < 50, "no step is applied"
        generator = torch.Generator().manual_seed(1000 + engine.global_step)
        inputs, targets = torch.randn(GLOBAL_BATCH, 7, generator=generator), torch.randn(GLOBAL_BATCH, 3, generator=generator)
        mine = slice(world.rank, None, world.world_size)
        outputs = engine(inputs=inputs[mine].to(dtype)).float()
        engine.backward((outputs - targets[mine]).square().sum(), GLOBAL_BATCH)
        engine.step()


def ended(engine: TrainingEngine) -> dict[str, Any]:
    """Where a case stands, and what its model computes: masters and the model's own copies may disagree."""
    outputs = engine(inputs=torch.ones(1, 7, dtype=DTYPES[engine.precision]))
    return {"state": engine.state(), "outputs": outputs.detach().float(), "learning_rate": engine.learning_rate}


def save(folder: Path, world: World, device: torch.device) -> None:
    """The states of every layout that has this number of ranks, and what the undisturbed runs end with."""
    for precision, stage in LAYOUTS:
        engine = build(stage, precision, 1, device)
        train(engine, SAVED_AT, world)
        name = f"{precision}-{world.world_size}-{stage}"
        _write(folder / f"{name}.state", engine.state(), world)
        train(engine, STEPS, world)
        _write(folder / f"{name}.undisturbed", ended(engine), world)
    distributed.barrier()


def load(folder: Path, world: World, device: torch.device) -> None:
    """Every state in the folder, gone on with in every layout that has this number of ranks."""
    for precision, stage in LAYOUTS:
        engine = build(stage, precision, 2, device)  # one for all: building takes most of the time
        for file in sorted(folder.glob("*.state")):
            saved: EngineState = torch.load(file, weights_only=False)
            engine.load_state(saved)
            loaded = ended(engine)
            train(engine, STEPS, world)
            _write(folder / f"{file.stem}-to-{precision}-{world.world_size}-{stage}.resumed", {"loaded": loaded, **ended(engine)}, world)


def _write(file: Path, content: Any, world: World) -> None:
    if world.rank == 0:
        torch.save(content, file)


def main(arguments: Sequence[str], world: World) -> None:
    """Do what is asked, in order."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("modes", nargs="+", choices=("save", "load"))
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    given = parser.parse_args(arguments)
    # PyTorch computes fp16 on every CPU, if slowly; DeepSpeed refuses it on those without fp16 instructions.
    get_accelerator().is_fp16_supported = lambda: True
    device = distributed.select_device(world, os.environ)
    distributed.form_group(world, device)
    for mode in given.modes:
        {"save": save, "load": load}[mode](given.folder, world, device)


if __name__ == "__main__":
    execute(main)
