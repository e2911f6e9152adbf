"""Trains tiny cases that go wrong, with the project's own trainer and engine, in ranks that no launcher looks after.

Started once per rank as `python -m tests.helpers.numbers_worker MODE FOLDER RESULT`. MODE plain trains every ZeRO stage in one
process, MODE stages also with an example whose loss is infinite, skipped and raised; rank 0 writes RESULT. Then rank 1 fails: in plain
its data raises, in stages it is killed. MODE stall trains until rank 1 stands still in its data.
"""

import dataclasses
import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from adakron import distributed, peers
from adakron.config import DataConfig, TrainingConfig
from adakron.data.sampler import GlobalBatchSampler
from adakron.determinism import compute_deterministically
from adakron.dumps import StepDump
from adakron.engine import ds_config
from adakron.engine.engine import TrainingEngine
from adakron.errors import NumericalError
from adakron.evaluator import Evaluator
from adakron.launcher import World
from adakron.metrics import MetricRecorder
from adakron.tasks.base import Batch, EncodedSplit, Forward
from adakron.tasks.glue import TextTask
from adakron.trainable import trainable_groups
from adakron.trainer import Trainer
from launch.program import execute
from tests.helpers.launch import ROOT
from tests.helpers.problems import PAD, PROBLEMS, SEED, prepare

STAGES = {"zero0_fp32": False, "zero1": True, "zero2_fp32": False, "zero2": True, "zero3": False}
"""Name of a shipped JSON to whether it trains in bf16."""

POISON = 5
"""The example whose loss is infinite: an infinite constant, whose gradient would be finite."""

STALL_SECONDS, TIMEOUT_SECONDS = 600, 8.0


class OddTask(TextTask):
    """A task that does something odd at an example."""

    poison: int | None = None
    fails: str | None = None

    def collate(self, encoded: EncodedSplit, indices: Any, pad_token_id: int) -> Batch:
        self.poisoned = self.poison in list(indices)
        if self.fails and distributed.rank() == 1:
            if self.fails == "exception":
                raise KeyError("no such column")
            if self.fails == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(STALL_SECONDS)
        return super().collate(encoded, indices, pad_token_id)

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(forward, batch)
        return (loss + float("inf") if self.poisoned else loss), logits


class Kept:
    """Metrics and dumps in memory."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []
        self.dumps: list[StepDump] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(values)

    def close(self) -> None: ...

    def keep(self, dump: StepDump) -> Path:
        self.dumps.append(dump)
        return Path(dump.name)

    def last_good(self) -> Path | None:
        return None


def build(folder: Path, name: str, world: World, **odd: Any) -> tuple[Trainer, TrainingEngine, Kept]:
    """A trainer of the classification problem; odd: attributes of OddTask, and training settings."""
    _, split, model = prepare(folder, "classification")
    problem = PROBLEMS["classification"]
    micro_batch = problem.global_batch // world.world_size // 2
    settings = {key: value for key, value in odd.items() if key in TrainingConfig.__dataclass_fields__}
    training = dataclasses.replace(problem.training(micro_batch, accumulation=2), **settings)
    task = OddTask(_data(folder, problem.label), training)
    for key, value in odd.items():
        if key not in settings:
            setattr(task, key, value)
    source = ds_config.read_json(str(ROOT / "ds_configs" / f"{name}.json")) | {"bf16": {"enabled": STAGES[name]}}
    values = ds_config.RunValues(micro_batch=micro_batch, accumulation=2, world_size=world.world_size, max_grad_norm=training.max_grad_norm)
    device = torch.device("cpu")
    torch.manual_seed(SEED + world.rank)
    engine = TrainingEngine(
        model, trainable_groups(model, training.weight_decay), ds_config.resolve(source, values), training, total_steps=problem.steps,
        device=device,
    )  # fmt: skip
    sampler = GlobalBatchSampler(
        split.lengths, micro_batch=micro_batch, global_batch=values.global_batch, world_size=world.world_size, rank=world.rank, seed=SEED
    )
    kept = Kept()
    trainer = Trainer(
        engine, task, sampler, split, {}, training, evaluator=Evaluator(task, batch_size=8, pad_token_id=PAD, device=device),
        recorder=MetricRecorder([kept]), pad_token_id=PAD, save_checkpoint=lambda *_: None, evidence=kept,
    )  # fmt: skip
    return trainer, engine, kept


def _data(folder: Path, label: str) -> DataConfig:
    return DataConfig(
        task_name="text", data_dir=str(folder / "classification"), text_column="text", label_column=label, problem="classification"
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of every bit of the tensors."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def train_plainly(folder: Path, name: str, world: World) -> dict[str, Any]:
    """Losses, gradient norms and every bit of what was trained."""
    trainer, _, kept = build(folder, name, world)
    result = trainer.run()
    return {
        "losses": [step["train/loss"] for step in kept.steps], "norms": [step["train/grad_norm"] for step in kept.steps],
        "tensors": digest(result.tensors),
    }  # fmt: skip


def train_wrongly(folder: Path, name: str, world: World) -> dict[str, Any]:
    """What a stage did with a loss that is infinite, once skipped and once raised."""
    record: dict[str, Any] = {}
    trainer, engine, kept = build(folder, name, world, poison=POISON, on_nonfinite="skip")
    result = trainer.run()
    record["skip"] = {
        "losses": [step["train/loss"] for step in kept.steps], "skipped": result.state.nonfinite_steps, "steps": engine.global_step,
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in result.tensors.values()),
    }  # fmt: skip
    trainer, engine, kept = build(folder, name, world, poison=POISON)
    said, good = "", _digest_each_step(engine)
    try:
        trainer.run()
    except NumericalError as error:
        said = str(error)
    mine = [{"rank": dump.rank, "number": dump.number, "parameters": digest(dump.parameters)} for dump in kept.dumps]
    record["raise"] = {
        "said": distributed.all_gather_object(said), "dumps": [one for rank in distributed.all_gather_object(mine) for one in rank],
        "left": digest(engine.trainable_tensors()), "good": good[-1], "steps": engine.global_step,
    }  # fmt: skip
    return record


def _digest_each_step(engine: TrainingEngine) -> list[str]:
    """Of the parameters before the first step and after every one that was applied; grows with them."""
    digests, step = [digest(engine.trainable_tensors())], engine.step

    def observed() -> bool:
        applied = step()
        if applied:
            digests.append(digest(engine.trainable_tensors()))
        return applied

    engine.step = observed  # type: ignore[method-assign]
    return digests


def _timeout(group: Any) -> float:
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


def main(arguments: Sequence[str], world: World) -> None:
    """See the module."""
    mode, folder, result = arguments[0], Path(arguments[1]), Path(arguments[2])
    device = distributed.select_device(world, os.environ)
    peers.GRACE_SECONDS = 3.0
    if mode == "stall":
        distributed.form_group(world, device, timedelta(seconds=TIMEOUT_SECONDS))
        build(folder, "zero2_fp32", world, fails="stall")[0].run()
    compute_deterministically()
    distributed.form_group(world, device, timedelta(minutes=3))
    records: dict[str, Any] = {name: {"plain": train_plainly(folder, name, world)} for name in STAGES}
    if mode == "stages":
        records = {name: record | train_wrongly(folder, name, world) for name, record in records.items()}
    if world.rank == 0:
        timeouts = [_timeout(group) for group in distributed_c10d._world.pg_map]
        result.write_text(json.dumps({"stages": records, "timeouts": timeouts}))
    build(folder, "zero2_fp32", world, fails="exception" if mode == "plain" else "kill")[0].run()


if __name__ == "__main__":
    execute(main)
