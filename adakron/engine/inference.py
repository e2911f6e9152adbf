"""A model that only computes, with its weights taken apart by ZeRO stage 3."""

from typing import Any

import deepspeed
import torch
from torch import nn

from adakron import weights
from adakron.engine import ds_config
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.engine.partitioning import ready_for_stage_3
from adakron.engine.upstream import quiet_initialisation, ready_deepspeed
from adakron.errors import ConfigError

_OF_TRAINING = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def inference_settings(path: str, precision: ds_config.Precision, *, batch_size: int, world_size: int) -> DeepSpeedSettings:
    """A training's JSON for a model that does not train: of it the ZeRO section counts, and the precision is the run's.

    batch_size: examples per forward pass and rank. Raises ConfigError with what is wrong with the file.
    """
    source: dict[str, Any] = {key: value for key, value in ds_config.read_json(path).items() if key not in _OF_TRAINING}
    source |= {name: {"enabled": precision == name} for name in ("bf16", "fp16")}
    values = ds_config.RunValues(micro_batch=batch_size, accumulation=1, world_size=world_size, max_grad_norm=0.0)
    settings = ds_config.resolve(source, values, name=path)
    problem = ds_config.parser_problem(settings.config) or ds_config.offload_problem(settings.config)
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return settings


def partition_for_inference(model: nn.Module, settings: DeepSpeedSettings, device: torch.device) -> nn.Module:
    """The model, each of whose weights is gathered for the moment it is needed; all ranks must make the same forward passes.

    model: frozen, loaded whole or partitioned. settings: of stage 3. Needs the process group.
    """
    ready_deepspeed(device)
    ready_for_stage_3(model, weights.DTYPES[settings.precision], device)
    with quiet_initialisation():
        engine, *_ = deepspeed.initialize(model=model, config=settings.config)
    module: nn.Module = engine.module.eval()
    return module
