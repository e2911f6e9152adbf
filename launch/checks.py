"""What is checked of a training run before anything is made: the JSON, what the run does, the splits it needs, the losses."""

import math

import torch
from torch import nn

from adakron import causal, models
from adakron.config import RunConfig
from adakron.engine import ds_config
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.errors import ConfigError, DataError
from adakron.evaluator import best_metric_name
from adakron.launcher import World
from adakron.tasks.base import Task
from launch.attachment import draws_noise


def resolve_deepspeed(config: RunConfig, world: World, device: torch.device) -> DeepSpeedSettings:
    """The DeepSpeed JSON, checked against flags, launcher and device."""
    training = config.training
    too_few = training.ranks_problem(world.world_size)
    if too_few:
        raise ConfigError(too_few)
    values = ds_config.RunValues(
        micro_batch=training.per_device_train_batch_size,
        accumulation=math.ceil(training.examples_per_step(world.world_size) / (training.per_device_train_batch_size * world.world_size)),
        examples=training.global_batch_size,
        world_size=world.world_size,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        fp16=training.fp16,
    )
    settings = ds_config.resolve(ds_config.read_json(config.deepspeed), values, name=config.deepspeed)
    problem = (
        ds_config.parser_problem(settings.config)
        or ds_config.device_problem(settings.precision, device.type)
        or ds_config.offload_problem(settings.config)
    )
    if settings.stage == 3 and config.model.quantization is not None:
        problem = problem or (
            f"quantization {config.model.quantization} does not go with ZeRO-3, which would take the quantised weights apart; choose"
            " ds_configs/zero2.json, or drop --quantization"
        )
    if problem:
        raise ConfigError(f"{config.deepspeed}: {problem}")
    if device.type == "cpu" and config.model.quantization == "4bit":
        raise ConfigError(
            "quantization 4bit is not for training on a CPU: bitsandbytes 0.50 repacks the weights in an evaluation and cannot compute"
            " gradients afterwards; choose --quantization 8bit, or a GPU"
        )
    return settings


def asks_for_stage(config: RunConfig) -> bool:
    """Whether a do_ flag asks for an evaluation or predictions, and so none of them means only that."""
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


def check_packing(config: RunConfig, model: nn.Module) -> None:
    """Raise ConfigError where --pack would change what is computed for an example."""
    if not config.data.pack:
        return
    causal.check_packing(model, config.data.max_seq_length)
    if config.training.dropout_masks == "per_example" and models.has_dropout(model):
        raise ConfigError(
            "dropout_masks per_example gives every row the masks of its example, and with pack a row holds several; set --dropout 0 or"
            " --dropout_masks framework, or drop --pack"
        )
    if config.adapter.resolved().inference_level == 1:
        raise ConfigError("inference_level 1 draws one expert per row, and with pack a row holds several texts; drop one of the two")


def check_consistency(config: RunConfig, model: nn.Module) -> None:
    """Raise ConfigError where a consistency loss was asked for and both its passes would be the same."""
    if config.training.consistency_weight and not (models.is_random_in_training(model) or draws_noise(config.adapter)):
        raise ConfigError(
            f"consistency_weight is {config.training.consistency_weight}, but two passes of this model are equal: it draws no experts and"
            " has no dropout, so the loss would be zero at twice the cost; drop --consistency_weight, or set --num_experts or --dropout"
        )
