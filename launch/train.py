"""Fine-tune a frozen transformer with Kronecker adapters: `deepspeed launch/train.py --deepspeed ds_configs/zero2.json`.

Everything that can be wrong with the input is found before a process group is formed: flags, JSON, output folder, data, model.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import torch
from torch import Tensor, nn

from adakron import backbone, distributed, models, run_folder, trainable
from adakron.config import DATA_FILES, RunConfig
from adakron.data.sampler import GlobalBatchSampler
from adakron.distributed import World
from adakron.engine import ds_config
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.engine.engine import TrainingEngine
from adakron.errors import ConfigError, DataError
from adakron.evaluator import Evaluator
from adakron.log import get_logger
from adakron.metrics import JsonLinesSink, MetricRecorder, TensorBoardSink, peak_memory_mib
from adakron.placement import some_of
from adakron.tasks import create_task
from adakron.tasks.base import Task
from adakron.tasks.classification import TextClassificationTask
from adakron.tasks.glue import TextTask
from adakron.trainable import ParameterReport
from adakron.trainer import Trainer, TrainResult, best_metric_name, total_steps
from launch.arguments import parse_train
from launch.attachment import attach, check_method, draws_noise
from launch.program import run_program
from launch.summary import summary_table

logger = get_logger(__name__)

DEFAULT_PARENT = Path("runs")
"""Where runs without --output_dir go."""


def main(arguments: Sequence[str], world: World) -> None:
    """Train, evaluate, save and report one run."""
    started = time.perf_counter()
    config = parse_train(arguments)
    if config.training.do_train is False or (config.training.do_train is None and _any_stage(config)):
        raise ConfigError("nothing to train: add --do_train, or use launch/evaluate.py and launch/predict.py on a saved run")
    device = distributed.select_device(world, os.environ)
    settings = resolve_deepspeed(config, world, device)
    if config.training.output_dir:
        run_folder.check_free(Path(config.training.output_dir), config.training.overwrite_output_dir)
    for folder_setting in (str(DEFAULT_PARENT) if not config.training.output_dir else None, config.training.logging_dir):
        if folder_setting:
            run_folder.check_writable(Path(folder_setting))
    check_method(config.adapter, settings)
    task = create_task(config.data, config.training)
    splits = splits_to_use(task, config)
    models.check_architecture(config.model, config.adapter, auto_class=task.auto_class, options=task.model_options())
    base = backbone.load_backbone(
        config.model, auto_class=task.auto_class, options=task.model_options(), seed=config.training.seed, device_type=device.type
    )
    new = base.new_parameters.names
    logger.info("%d parameters of the head are new: %s", len(new), some_of(new))
    attached = attach(base, config.adapter, config.training.seed, models.DTYPES[settings.precision])
    model, info, router = attached.model, attached.info, attached.router
    trainable.assert_trainable(model, info)
    check_consistency(config, model)
    if config.training.gradient_checkpointing:
        models.checkpoint_activations(model, router)
    report = trainable.parameter_report(model, info)
    encoded = {name: task.encode(name, base.tokenizer) for name in splits}
    for name, split in encoded.items():
        if split.truncated:
            length = config.data.max_seq_length
            logger.info("%d of %d %s examples are longer than %d tokens and were cut", split.truncated, len(split), name, length)

    distributed.form_group(world, device)
    logger.info(
        "%s on %d x %s, ZeRO-%d, %s: %s trainable of %s parameters (adapters %s in %d layers, head %s, backbone %s)",
        config.adapter.method, world.world_size, device.type, settings.stage, settings.precision, f"{report.trainable:,}",
        f"{report.total:,}", f"{report.adapter:,}", len(info.sites), f"{report.head:,}", f"{report.tuned:,}",
    )  # fmt: skip
    torch.manual_seed(config.training.seed + world.rank)  # dropout: a stream of its own on every rank
    evaluator = Evaluator(
        task,
        batch_size=config.training.per_device_eval_batch_size,
        pad_token_id=int(base.tokenizer.pad_token_id),
        device=device,
        world_size=world.world_size,
        rank=world.rank,
        disable_progress=config.training.disable_tqdm,
        before_batch=router.evaluation_batch if router else None,
    )
    sampler = GlobalBatchSampler(
        encoded["train"].lengths,
        micro_batch=config.training.per_device_train_batch_size,
        accumulation=config.training.gradient_accumulation_steps,
        world_size=world.world_size,
        rank=world.rank,
        seed=config.training.seed,
    )
    engine = TrainingEngine(
        model,
        trainable.trainable_groups(model, config.training.weight_decay, attached.vectors),
        settings,
        config.training,
        total_steps=total_steps(config.training, sampler.steps_per_epoch),
        device=device,
    )

    folder = distributed.on_rank_0(lambda: claim_folder(as_recorded(config, base.name, task), settings))

    def save(target: Path, trained: Mapping[str, Tensor], state: Mapping[str, Any], *, merge: bool = False) -> None:
        if world.rank == 0:
            target.mkdir(exist_ok=True)
            attached.folder.write(target, trained, auto_class=task.auto_class, model_options=task.model_options(), merge=merge)
            base.tokenizer.save_pretrained(target)
            run_folder.write_json(target / run_folder.STATE_FILE, state)

    def save_checkpoint(step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        save(folder / f"{run_folder.CHECKPOINT_PREFIX}{step}", tensors, state)
        if world.rank == 0:
            run_folder.prune_checkpoints(folder, config.training.save_total_limit, state["best_step"])

    recorder = MetricRecorder(_sinks(config, folder) if world.rank == 0 else ())
    trainer = Trainer(
        engine,
        task,
        sampler,
        encoded["train"],
        {name: encoded[name] for name in splits if name.startswith("validation")},
        config.training,
        evaluator=evaluator,
        recorder=recorder,
        pad_token_id=int(base.tokenizer.pad_token_id),
        save_checkpoint=save_checkpoint,
        before_pass=router.training_pass if router else None,
    )
    with contextlib.closing(recorder):  # what a run that fails last measured is what one wants to see
        result = trainer.run()
        scores = result.scores if result.scores is not None or not evaluates(config) else trainer.evaluate()
    save(folder, result.tensors, dataclasses.asdict(result.state), merge=config.training.merge_experts)
    predictions = {name: evaluator.outputs(engine, encoded[name], "predicting") for name in splits if name.startswith("test")}
    memory = float(distributed.all_reduce_max(torch.tensor(peak_memory_mib(device))))
    if world.rank == 0:
        for name, outputs in predictions.items():
            task.write_predictions(name, outputs, folder / f"predict_results_{name}.tsv")
        results = collect_results(config, result, scores, report, memory, time.perf_counter() - started)
        write_results(folder, results)
        pairs = isinstance(task, TextClassificationTask) and len(task.spec.text_columns) == 2
        print(summary_table(config, results, report, folder, pairs=pairs), flush=True)
    distributed.barrier()


def check_consistency(config: RunConfig, model: nn.Module) -> None:
    """Raise ConfigError where a consistency loss was asked for and both its passes would be the same."""
    if config.training.consistency_weight and not (models.is_random_in_training(model) or draws_noise(config.adapter)):
        raise ConfigError(
            f"consistency_weight is {config.training.consistency_weight}, but two passes of this model are equal: it draws no experts and"
            " has no dropout, so the loss would be zero at twice the cost; drop --consistency_weight, or set --num_experts or --dropout"
        )


def resolve_deepspeed(config: RunConfig, world: World, device: torch.device) -> DeepSpeedSettings:
    """The DeepSpeed JSON, checked against flags, launcher and device."""
    training = config.training
    values = ds_config.RunValues(
        micro_batch=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        world_size=world.world_size,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        fp16=training.fp16,
    )
    settings = ds_config.resolve(ds_config.read_json(config.deepspeed), values, name=config.deepspeed)
    problem = ds_config.parser_problem(settings.config) or ds_config.device_problem(settings.precision, device.type)
    if problem:
        raise ConfigError(f"{config.deepspeed}: {problem}")
    return settings


def _any_stage(config: RunConfig) -> bool:
    return bool(config.training.do_eval or config.training.do_predict)


def evaluates(config: RunConfig) -> bool:
    """Whether the run ends with an evaluation: asked for, or no do_ flag given at all."""
    training = config.training
    return bool(training.do_eval) or (training.do_eval is None and not training.do_train and not training.do_predict)


def splits_to_use(task: Task, config: RunConfig) -> list[str]:
    """The splits that this run needs, in order. Raises DataError where one is missing, ConfigError for an unknown metric."""
    there = list(task.splits())
    validation = [name for name in there if name.startswith("validation")]
    tests = [name for name in there if name.startswith("test")]
    problems = []
    if "train" not in there:
        problems.append(
            f"task {task.name} has no train split (found: {', '.join(there) or 'none'}); give --train_file or a --data_dir with train.*"
        )
    if not validation and (evaluates(config) or config.training.eval_strategy != "no"):
        problems.append(
            f"task {task.name} has no validation split (found: {', '.join(there) or 'none'}); give --validation_file, or train without "
            "evaluation: --do_train --eval_strategy no"
        )
    if config.training.do_predict and not tests:
        problems.append(f"--do_predict: task {task.name} has no test split (found: {', '.join(there) or 'none'}); give --test_file")
    if problems:
        raise DataError("\n".join(problems))
    metric = best_metric_name(config.training, task)
    if metric not in (*task.metric_names, "loss"):
        raise ConfigError(
            f"metric_for_best_model is {metric}; {task.name} reports loss, {', '.join(task.metric_names)} (set --metric_for_best_model)"
        )
    return ["train", *validation, *(tests if config.training.do_predict else [])]


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


def claim_folder(config: RunConfig, settings: DeepSpeedSettings) -> Path:
    """Make the output folder, holding the resolved configuration. Rank 0 only."""
    training = config.training
    if training.output_dir:
        folder = Path(training.output_dir)
        run_folder.claim(folder, training.overwrite_output_dir)
    else:
        name = f"{config.data.task_name}-{config.adapter.method}-seed{training.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = run_folder.claim_new(DEFAULT_PARENT / name)
    record = {"config": config.to_dict(), "precision": settings.precision, "command": sys.argv, **run_folder.environment()}
    run_folder.write_json(folder / run_folder.RUN_FILE, record)
    run_folder.write_json(folder / run_folder.DEEPSPEED_FILE, settings.config)
    return folder


def _sinks(config: RunConfig, folder: Path) -> list[TensorBoardSink | JsonLinesSink]:
    logging_dir = Path(config.training.logging_dir or folder / run_folder.TENSORBOARD_FOLDER)
    return [TensorBoardSink(logging_dir), JsonLinesSink(folder / run_folder.METRICS_FILE)]


def collect_results(
    config: RunConfig,
    result: TrainResult,
    scores: Mapping[str, float] | None,
    report: ParameterReport,
    memory: float,
    wall: float,
) -> dict[str, dict[str, Any]]:
    """The flat numbers of train_results.json and eval_results.json."""
    seconds = max(1e-9, result.seconds)
    train = {
        "task": config.data.task_name,
        "method": config.adapter.method,
        "seed": config.training.seed,
        "epoch": result.state.epoch,
        "train_loss": result.loss,
        "train_steps": result.state.global_step,
        "skipped_steps": result.state.skipped_steps,
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
    }
    return {"train": train, "eval": dict(scores or {})}


def write_results(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """train_results.json, eval_results.json where there are any, and both as all_results.json."""
    for name, values in results.items():
        if values:
            run_folder.write_json(folder / f"{name}_results.json", values)
    run_folder.write_json(folder / "all_results.json", {key: value for values in results.values() for key, value in values.items()})


if __name__ == "__main__":
    sys.exit(run_program(main))
