"""This engine, as `launch/train.py` runs it: DeepSpeed, its sampler, metrics into files; and `launch/evaluate.py` on what it trained."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from adakron import distributed, passes, trainable
from adakron.engine.engine import TrainingEngine
from adakron.evaluator import Evaluator
from adakron.launcher import World, read_world
from adakron.metrics import JsonLinesSink, MetricRecorder, Sink, TensorBoardSink
from adakron.train_state import TrainResult
from adakron.trainer import Trainer
from launch.contenders.pace import Pace
from launch.contenders.phases import Phases
from launch.contenders.workload import EVALUATION_BATCH, Workload, validation_split
from launch.preparing import Prepared, prepare
from launch.recording import claim_folder
from launch.saved_run import open_run, saved_run_parser
from launch.saving import Saver


def train(workload: Workload, pace: Pace) -> None:
    """The whole loop, on as many ranks as were started. What it does beside steps, checks and files, is that of a run without
    evaluation and checkpoints.
    """
    world = read_world(os.environ)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        run = prepare(workload.config("--output_dir", str(Path(folder) / "run"), ranks=world.world_size), world)
        distributed.form_group(world, run.device)
        held.callback(distributed.leave_group)
        training = run.config.training
        torch.manual_seed(training.seed + world.rank)
        engine = TrainingEngine(
            run.attached.model, trainable.trainable_groups(run.attached.model, training.weight_decay, run.attached.vectors), run.settings,
            training, total_steps=workload.total_steps, device=run.device,
        )  # fmt: skip
        sinks: list[Sink] = []
        if world.rank == 0:
            sinks = [TensorBoardSink(Path(folder) / "tensorboard"), JsonLinesSink(Path(folder) / "metrics.jsonl")]
        recorder = MetricRecorder(sinks)
        evaluator = Evaluator(run.task, batch_size=EVALUATION_BATCH, pad_token_id=run.pad_token_id, device=run.device)
        trainer = Trainer(
            engine, run.task, run.sampler, run.encoded["train"], {}, training, evaluator=evaluator, recorder=recorder,
            pad_token_id=run.pad_token_id, save_checkpoint=lambda take: None, before_pass=run.before_pass, boundary=pace.before_step,
        )  # fmt: skip
        pace.instrument = partial(_instrument, run, engine, trainer)
        with contextlib.closing(recorder):
            result = trainer.run()
        pace.end_round()
        pace.evaluation(lambda: _saved_run(run, result, world, held))


def _instrument(run: Prepared, engine: TrainingEngine, trainer: Trainer, phases: Phases) -> None:
    for owner, name, phase in (
        (run.sampler, "_share", "data"), (run.task, "collate", "data"), (passes, "to_device", "data"), (run.task, "loss", "forward"),
        (engine, "backward", "backward"), (engine, "step", "optimizer"), (trainer._log, "record", "log"), (trainer._log, "write", "log"),
    ):  # fmt: skip
        phases.wrap(owner, name, phase)


def _saved_run(run: Prepared, result: TrainResult, world: World, held: contextlib.ExitStack) -> Callable[[], object]:
    """What scores the split with what was trained, saved and loaded again as launch/evaluate.py does it."""
    folder = distributed.on_rank_0(lambda: claim_folder(run.recorded, run.settings, run.layout, held))
    saver = Saver(folder, run.attached, run.tokenizer, run.task, keep=None, run=run.described)
    distributed.on_rank_0(lambda: saver.adapter(folder, result.tensors))
    saver.close()
    saved = open_run(saved_run_parser("").parse([str(folder)]), world)
    split = validation_split(saved.task)
    return partial(saved.evaluator.score, saved.model, split, saved.task.encode(split, saved.tokenizer))
