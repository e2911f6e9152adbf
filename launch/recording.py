"""What a training run writes down: its configuration, where its metrics go, its results."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from adakron import run_folder
from adakron.config import DATA_FILES, RunConfig
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.fitting import MicroBatchFit
from adakron.log import get_logger
from adakron.metrics import JsonLinesSink, TensorBoardSink
from adakron.redaction import redact_arguments, redact_values
from adakron.run_lock import RunLock
from adakron.tasks.base import Task
from adakron.tasks.glue import TextTask
from adakron.train_state import TrainResult
from adakron.trainable import ParameterReport
from launch.resuming import Resumption, check_unchanged

logger = get_logger(__name__)

DEFAULT_PARENT = Path("runs")
"""Where runs without --output_dir go."""


def as_recorded(config: RunConfig, base_model: str, task: Task) -> RunConfig:
    """The configuration as it is recorded: files are found again from any working directory, what was guessed is fixed."""
    files = {name: getattr(config.data, name) for name in DATA_FILES}
    data: dict[str, Any] = {name: str(Path(value).expanduser().resolve()) for name, value in files.items() if value}
    if isinstance(task, TextTask):
        data["text_column"] = task.spec.text_columns[0]
    tokenizer = config.model.tokenizer_name
    if tokenizer and Path(tokenizer).is_dir():
        tokenizer = str(Path(tokenizer).resolve())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, model_name_or_path=base_model, tokenizer_name=tokenizer),
        data=dataclasses.replace(config.data, **data),
    )


def claim_folder(
    config: RunConfig,
    settings: DeepSpeedSettings,
    layout: Mapping[str, Any],
    held: contextlib.ExitStack,
    resumption: Resumption | None = None,
) -> Path:
    """Make the output folder, holding the resolved configuration; held gets its lock. Rank 0 only.

    layout: ranks, stage, precision. A run that goes on in its own folder leaves there what the folder says of how it began.
    """
    training = config.training
    record = {
        "config": config.to_dict(),
        "precision": settings.precision,
        "command": redact_arguments(sys.argv),
        **run_folder.environment(),
    }
    went_on = []
    if resumption is not None and resumption.checkpoint is not None:
        # Versions are those of now, at the top of the record; these are those of then, for whoever looks later.
        start = {"step": resumption.step, "checkpoint": str(resumption.checkpoint.absolute()), **layout}
        went_on = [{**start, "command": record["command"], **run_folder.environment()}]
    if resumption is not None and resumption.in_place:
        folder = Path(str(training.output_dir))
        held.enter_context(RunLock(folder))
        check_unchanged(resumption, folder)
        before = run_folder.read_run(folder)
        record["command"] = before.get("command")
        went_on = [*before.get("resumed", []), *went_on]
    elif training.output_dir:
        folder = Path(training.output_dir)
        unchanged = functools.partial(check_unchanged, resumption, folder) if resumption else None
        held.enter_context(run_folder.claim(folder, training.overwrite_output_dir, unchanged))
    else:
        name = f"{config.data.task_name}-{config.adapter.method}-seed{training.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        folder, lock = run_folder.claim_new(DEFAULT_PARENT / name)
        held.enter_context(lock)
    if went_on:
        record["resumed"] = went_on
    run_folder.write_json(folder / run_folder.RUN_FILE, redact_values(record))
    run_folder.write_json(folder / run_folder.DEEPSPEED_FILE, redact_values(settings.config))
    (folder / run_folder.STOPPED_FILE).unlink(missing_ok=True)
    run_folder.remove_partials(folder)
    return folder


def record_micro_batch(folder: Path, fit: MicroBatchFit) -> None:
    """Add to run.json what --auto_micro_batch found. Rank 0 only."""
    record = {**run_folder.read_run(folder), "micro_batch": dataclasses.asdict(fit)}
    run_folder.write_json(folder / run_folder.RUN_FILE, record)


def mark_stopped(folder: Path, asked: str, step: int, total_steps: int) -> None:
    """Say in the folder that the run stopped on request with a checkpoint of this step. Rank 0 only, when that is on the disk.

    asked: what asked it. Where it cannot be written the run can still go on; only a script that looks for the file would not know.
    """
    try:
        run_folder.write_json(folder / run_folder.STOPPED_FILE, {"stopped_by": asked, "step": step, "total_steps": total_steps})
    except OSError as error:
        logger.warning("%s could not be written (%s)", folder / run_folder.STOPPED_FILE, error.strerror)


def metric_sinks(config: RunConfig, folder: Path, resumption: Resumption | None = None) -> list[TensorBoardSink | JsonLinesSink]:
    """TensorBoard in logging_dir and JSON lines in the run's folder; without what they said of later steps where a run goes on there.

    Rank 0 only.
    """
    logging_dir = Path(config.training.logging_dir or folder / run_folder.TENSORBOARD_FOLDER)
    last_step = resumption.step if resumption is not None and resumption.in_place else None
    purge_step = last_step + 1 if last_step is not None else None
    # An evaluation that the checkpoint does not know will be made again.
    known = resumption.saved.snapshot.last_scores if resumption is not None and resumption.saved is not None else None
    lines = JsonLinesSink(folder / run_folder.METRICS_FILE, last_step, evaluates_again=known is None or known[0] != last_step)
    return [TensorBoardSink(logging_dir, purge_step), lines]


def collect_results(
    config: RunConfig,
    result: TrainResult,
    scores: Mapping[str, float] | None,
    report: ParameterReport,
    memory: float,
    wall: float,
    resumed_from: int,
) -> dict[str, dict[str, Any]]:
    """The flat numbers of train_results.json and eval_results.json.

    memory: peak in MiB. wall: seconds of this process, which went on at step resumed_from; everything else counts from step 0.
    """
    seconds = max(1e-9, result.seconds)
    train = {
        "task": config.data.task_name,
        "method": config.adapter.method,
        "seed": config.training.seed,
        "epoch": result.state.epoch,
        "train_loss": result.loss,
        "train_steps": result.state.global_step,
        "skipped_steps": result.state.skipped_steps,
        "nonfinite_steps": result.state.nonfinite_steps,
        "train_samples": result.samples,
        "train_tokens": result.tokens,
        "train_runtime": result.seconds,
        "train_samples_per_second": result.samples / seconds,
        "train_tokens_per_second": result.tokens / seconds,
        "train_steps_per_second": result.state.global_step / seconds,
        "adapter_parameters": report.adapter,
        "head_parameters": report.head,
        "tuned_parameters": report.tuned,
        "backbone_parameters": report.backbone,
        "adapter_percent": report.percent,
        "trainable_percent": report.trainable_percent,
        "peak_memory_mib": memory,
        "wall_seconds": wall,
        "resumed_from_step": resumed_from,
    }
    return {"train": train, "eval": dict(scores or {})}


def write_results(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """train_results.json, eval_results.json where there are any, and both as all_results.json."""
    for name, values in results.items():
        if values:
            run_folder.write_json(folder / f"{name}_results.json", values)
    run_folder.write_json(
        folder / run_folder.ALL_RESULTS_FILE, {key: value for values in results.values() for key, value in values.items()}
    )
