"""This engine, as `launch/train.py` runs it: DeepSpeed, its sampler, metrics into files."""

import contextlib
import tempfile
from pathlib import Path

import torch

from adakron import distributed, trainable
from adakron.engine.engine import TrainingEngine
from adakron.evaluator import Evaluator
from adakron.launcher import World
from adakron.metrics import JsonLinesSink, MetricRecorder, TensorBoardSink
from adakron.trainer import Trainer
from launch.contenders.pace import Pace
from launch.contenders.workload import Workload
from launch.preparing import prepare


def train(workload: Workload, pace: Pace) -> None:
    """The whole loop. What it does beside steps, checks and files, is that of a run without evaluation and checkpoints."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        run = prepare(workload.config("--output_dir", str(Path(folder) / "run")), World())
        distributed.form_group(World(), run.device)
        held.callback(distributed.leave_group)
        training = run.config.training
        torch.manual_seed(training.seed)
        engine = TrainingEngine(
            run.attached.model, trainable.trainable_groups(run.attached.model, training.weight_decay, run.attached.vectors), run.settings,
            training, total_steps=workload.total_steps, device=run.device,
        )  # fmt: skip
        recorder = MetricRecorder([TensorBoardSink(Path(folder) / "tensorboard"), JsonLinesSink(Path(folder) / "metrics.jsonl")])
        evaluator = Evaluator(run.task, batch_size=64, pad_token_id=run.pad_token_id, device=run.device)
        trainer = Trainer(
            engine, run.task, run.sampler, run.encoded["train"], {}, training, evaluator=evaluator, recorder=recorder,
            pad_token_id=run.pad_token_id, save_checkpoint=lambda take: None, before_pass=run.before_pass, boundary=pace.before_step,
        )  # fmt: skip
        with contextlib.closing(recorder):
            trainer.run()
        pace.end_round()
