"""Fine-tune a frozen transformer with Kronecker adapters: `deepspeed launch/train.py --deepspeed ds_configs/zero2.json`.

What can be wrong with the input is found before a process group is formed, as far as `launch/preparing.py` can tell.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


from adakron.signals import SignalListener

LISTENER = SignalListener()
if __name__ == "__main__":
    LISTENER.listen()  # before the imports below, which take seconds

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import numpy as np
import torch

from adakron import distributed, run_folder, trainable
from adakron.engine.engine import TrainingEngine
from adakron.evaluator import Evaluator
from adakron.launcher import World
from adakron.log import get_logger
from adakron.metrics import MetricRecorder, Sink, peak_memory_mib
from adakron.stopping import StopAgreement, StopRequest
from adakron.train_state import TrainResult
from adakron.trainer import Trainer, total_steps
from launch import resuming
from launch.arguments import parse_train
from launch.checks import evaluates
from launch.evidence import RunEvidence
from launch.preparing import Prepared, prepare
from launch.program import execute, refuse_idle_tasks
from launch.recording import claim_folder, collect_results, mark_stopped, metric_sinks, record_micro_batch, write_results
from launch.replaying import asks_for_replay, run_replay
from launch.saving import Saver
from launch.summary import summary_table
from launch.watching import watched

logger = get_logger(__name__)


def main(arguments: Sequence[str], world: World) -> None:
    """Train, evaluate, save and report one run; or compute a step again (`--replay`)."""
    started = time.perf_counter()
    if asks_for_replay(arguments):
        run_replay(arguments, world)
        return
    config = parse_train(arguments)
    refuse_idle_tasks(world)
    run = prepare(config, world)
    distributed.form_group(world, run.device, timedelta(minutes=run.config.training.timeout_minutes))
    agreement = _agree(run)
    if run.resumption is not None and run.resumption.finished:
        if world.rank == 0:
            print(f"{run.config.training.output_dir} holds a finished run: nothing is left to do", flush=True)
        return
    _say_what_trains(run, world)
    with contextlib.ExitStack() as held:
        _train(run, world, agreement, held, started)


def _agree(run: Prepared) -> StopAgreement:
    """From here on signals only ask, and all ranks stop together."""
    agreement = StopAgreement(LISTENER, run.config.training.max_hours)
    LISTENER.defer()
    try:
        agreement.now()
    except StopRequest as stop:
        raise StopRequest(resuming.stopped_early_message(str(stop))) from None
    resuming.check_agreement(run.resumption)
    return agreement


def _say_what_trains(run: Prepared, world: World) -> None:
    if run.resumption is not None:
        logger.info("%s", resuming.described_start(run.resumption, run.layout))
    report = run.report
    logger.info(
        "%s on %d x %s, ZeRO-%d, %s: %s trainable of %s parameters (adapters %s in %d layers, head %s, backbone %s)",
        run.config.adapter.method, world.world_size, run.device.type, run.settings.stage, run.settings.precision, f"{report.trainable:,}",
        f"{report.total:,}", f"{report.adapter:,}", len(run.attached.info.sites), f"{report.head:,}", f"{report.tuned:,}",
    )  # fmt: skip


def _train(run: Prepared, world: World, agreement: StopAgreement, held: contextlib.ExitStack, started: float) -> None:
    training, attached, resumption = run.config.training, run.attached, run.resumption
    # A stream of its own on every rank: the framework's dropout, and what a method of PEFT's draws besides.
    torch.manual_seed(training.seed + world.rank)
    steps = total_steps(training, run.sampler.steps_per_epoch)
    engine = TrainingEngine(
        attached.model,
        trainable.trainable_groups(attached.model, training.weight_decay, attached.vectors),
        run.settings,
        training,
        total_steps=steps,
        device=run.device,
    )
    folder = distributed.on_rank_0(lambda: claim_folder(run.recorded, run.settings, run.layout, held, resumption))
    saver = Saver(folder, attached, run.tokenizer, run.task, keep=training.save_total_limit, run=run.described)
    held.callback(saver.close)
    watch = distributed.peer_watch()
    if watch is not None:  # another rank's end must not cut a checkpoint off that is being written
        watch.finish_first(saver.settle)
    heartbeat = held.enter_context(watched(folder, world, steps, resumption.step if resumption is not None else 0))

    def before_evaluation_batch() -> None:
        heartbeat.progress()
        agreement.boundary()

    evaluator = Evaluator(
        run.task,
        batch_size=training.per_device_eval_batch_size,
        pad_token_id=run.pad_token_id,
        device=run.device,
        world_size=world.world_size,
        rank=world.rank,
        disable_progress=training.disable_tqdm,
        before_batch=attached.router.evaluation_batch if attached.router else None,
        boundary=before_evaluation_batch,
    )
    sinks: list[Sink] = []
    distributed.on_rank_0(lambda: sinks.extend(metric_sinks(run.config, folder, resumption)))
    recorder = MetricRecorder(sinks)
    trainer = Trainer(
        engine,
        run.task,
        run.sampler,
        run.encoded["train"],
        run.evaluations,
        training,
        evaluator=evaluator,
        recorder=recorder,
        pad_token_id=run.pad_token_id,
        save_checkpoint=saver.checkpoint,
        evidence=RunEvidence(folder, run.recorded, run.settings.precision, run.task, saver.newest),
        before_pass=run.before_pass,
        boundary=agreement.boundary,
        heartbeat=heartbeat,
    )
    if resumption is not None and resumption.saved is not None:
        trainer.resume(resumption.saved.snapshot, saved=resumption.in_place)
    try:
        with contextlib.closing(recorder):  # what a run that fails last measured is what one wants to see
            if training.auto_micro_batch and trainer.step < trainer.total_steps:
                _fit_micro_batch(run, trainer, folder)
            result = trainer.run()
            scores = result.scores if result.scores is not None or not evaluates(run.config) else trainer.evaluate()
        saver.wait()
        distributed.on_rank_0(lambda: _write_adapter(run, saver, folder, result))
        heartbeat.doing("predicting")
        predictions = {name: evaluator.outputs(engine, split, "predicting") for name, split in run.predictions.items()}
    except StopRequest as stop:
        trainer.save()
        saver.wait()
        if trainer.step:
            distributed.on_rank_0(functools.partial(mark_stopped, folder, str(stop), trainer.step, trainer.total_steps))
        raise StopRequest(resuming.stopped_message(str(stop), trainer, folder)) from None
    memory = float(distributed.all_reduce_max(torch.tensor(peak_memory_mib(run.device))))
    distributed.on_rank_0(lambda: _report(run, folder, result, scores, predictions, memory=memory, wall=time.perf_counter() - started))


def _fit_micro_batch(run: Prepared, trainer: Trainer, folder: Path) -> None:
    fit = trainer.fit_micro_batch()
    distributed.on_rank_0(lambda: record_micro_batch(folder, fit))
    if fit.taken != fit.asked and (run.attached.router is not None or run.config.training.dropout_masks == "framework"):
        logger.warning(
            "experts or dropout are drawn by micro-batch here, so results are those of --per_device_train_batch_size %d", fit.taken
        )


def _write_adapter(run: Prepared, saver: Saver, folder: Path, result: TrainResult) -> None:
    saver.adapter(folder, result.tensors, merge=run.config.training.merge_experts)
    run_folder.write_json(folder / run_folder.STATE_FILE, dataclasses.asdict(result.state))


def _report(
    run: Prepared,
    folder: Path,
    result: TrainResult,
    scores: Mapping[str, float] | None,
    predictions: Mapping[str, np.ndarray],
    *,
    memory: float,
    wall: float,
) -> None:
    """Predictions and results into the folder, the summary onto the screen. memory: peak in MiB. wall: seconds of this process."""
    for name, outputs in predictions.items():
        run.task.write_predictions(name, outputs, folder)
    resumed_from = run.resumption.step if run.resumption is not None else 0
    results = collect_results(run.config, result, scores, run.report, memory, wall, resumed_from)
    write_results(folder, results)
    print(summary_table(run.config, results, run.report, folder, run.task), flush=True)


if __name__ == "__main__":
    execute(main)
