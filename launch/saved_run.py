"""A finished run, opened again: its configuration, its backbone with the saved adapter, on the device and in its precision."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from adakron import adapter_folder, backbone, distributed, models, run_folder
from adakron.config import DATA_FILES, DataConfig, ModelConfig, RunConfig
from adakron.engine.ds_config import Precision
from adakron.engine.inference import inference_settings, partition_for_inference
from adakron.errors import CheckpointError, ConfigError
from adakron.evaluator import Evaluator
from adakron.launcher import World
from adakron.manifest import MANIFEST_FILE, verify
from adakron.store import CheckpointStore
from adakron.tasks import create_task
from adakron.tasks.base import Task
from adakron.weights import DTYPES
from launch import attachment
from launch.arguments import Parser, add_launcher_flags


@dataclass(frozen=True)
class SavedRun:
    """model: in evaluation mode, with the adapter and head of the folder. evaluator: for this world and batch size.

    precision: fp32, bf16 or fp16. partitioned: ZeRO stage 3 has taken the weights apart, so all ranks make equally many passes.
    """

    folder: Path
    config: RunConfig
    task: Task
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    evaluator: Evaluator
    device: torch.device
    precision: Precision = "fp32"
    partitioned: bool = False


def saved_run_parser(description: str, *groups: Any) -> Parser:
    """The flags common to the programs that use a saved run: its folder, and the data flags, which win over the saved ones.

    groups: further classes of settings, whose fields are flags.
    """
    parser = Parser((DataConfig, *groups), description)
    for action in parser._actions:
        if action.dest in DataConfig.__dataclass_fields__:
            action.default = argparse.SUPPRESS
    parser.add_argument("run_folder", help="Output folder of a run, or one of its checkpoint-<step> folders.")
    parser.add_argument("--per_device_eval_batch_size", type=int, help="Examples per forward pass and rank. Default: the run's.")
    parser.add_argument("--model_name_or_path", help="Where the run's backbone is now, if it moved.")
    parser.add_argument(
        "--inference_level", type=int, choices=(0, 1, 3),
        help="Experts of a mixture: 3 their average, 1 a random one per sentence, 0 per token. Default: the run's.",
    )  # fmt: skip
    parser.add_argument(
        "--allow_other_backbone",
        action="store_true",
        help="Load the adapter though it was trained on another backbone; warns what differs.",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="Run model code that comes with the run's backbone, as the run itself was told to. Only for sources you trust.",
    )
    add_launcher_flags(parser)
    return parser


def read_record(home: Path) -> tuple[dict[str, Any], RunConfig, torch.dtype]:
    """What run.json of a folder holds, the configuration in it, and the run's precision; CheckpointError where it is not so."""
    record = run_folder.read_run(home)
    try:
        return record, RunConfig.from_dict(record["config"]), DTYPES[record["precision"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else "; ".join(str(error).splitlines())
        raise CheckpointError(
            f"{home / run_folder.RUN_FILE} does not fit this version: {reason}; restore it, or use the release that wrote it"
        ) from error


def task_of(folder: Path) -> str:
    """The name of a saved run's task, before anything is loaded. folder: the run's, or one of its checkpoints; else CheckpointError."""
    return read_record(_home_of(folder))[1].data.task_name


def _home_of(folder: Path) -> Path:
    """The run's folder, of a checkpoint or of itself."""
    homes = (home for home in (folder, folder.parent) if (home / run_folder.RUN_FILE).is_file())
    return next(homes, folder)


def read_settings(options: argparse.Namespace, folder: Path, needs_data: bool = True) -> tuple[RunConfig, torch.dtype]:
    """A run's configuration with the flags given now, and its precision. needs_data: whether any split will be read."""
    home = _home_of(folder)
    _, saved, precision = read_record(home)
    given = {name: getattr(options, name) for name in DataConfig.__dataclass_fields__ if hasattr(options, name)}
    if not needs_data or any(name in given for name in DATA_FILES):
        # Files named now stand alone; what the run was trained on may be gone.
        given = dict.fromkeys((*DATA_FILES, "max_train_samples", "max_eval_samples", "max_predict_samples")) | given
    elif saved.data.validation_file or saved.data.test_file:
        given = {"train_file": None} | given
    model_config = saved.model
    if options.model_name_or_path:
        model_config = dataclasses.replace(model_config, model_name_or_path=options.model_name_or_path)
    check_trust(model_config, home / run_folder.RUN_FILE, options.trust_remote_code)
    config = dataclasses.replace(saved, data=dataclasses.replace(saved.data, **given), model=model_config)
    _check_finished(folder)
    _check_whole(folder)
    return config, precision


def check_trust(model: ModelConfig, source: str | Path, trusted: bool) -> None:
    """CheckpointError where a file says that the backbone's own code is to be run, and no flag does. source: the file."""
    if model.trust_remote_code and not trusted:
        raise CheckpointError(
            f"{source} says that the backbone {model.model_name_or_path} runs code of its own, and a file cannot ask for that; give"
            " --trust_remote_code, if you trust where both come from"
        )


def eval_batch_size(options: argparse.Namespace, config: RunConfig) -> int:
    """Examples per forward pass and rank: as given now, else the run's."""
    batch_size: int | None = options.per_device_eval_batch_size
    if batch_size is None:
        batch_size = config.training.per_device_eval_batch_size
    if batch_size < 1:
        raise ConfigError(f"per_device_eval_batch_size is {batch_size}; it must be at least 1")
    return batch_size


def open_run(
    options: argparse.Namespace, world: World, needs_data: bool = True, *, deepspeed: str | None = None, with_adapter: bool = True
) -> SavedRun:
    """Load what a folder holds. needs_data: whether any split will be read.

    deepspeed: a JSON; at its stage 3 the weights are partitioned, and the process group is formed here. with_adapter: False leaves the
    backbone as it was before the run.
    """
    folder = Path(options.run_folder)
    config, dtype = read_settings(options, folder, needs_data)
    precision = next(name for name in get_args(Precision) if DTYPES[name] == dtype)
    batch_size = eval_batch_size(options, config)
    device = distributed.select_device(world, os.environ)
    settings = inference_settings(deepspeed, precision, batch_size=batch_size, world_size=world.world_size) if deepspeed else None
    auto_class, model_options = attachment.read_head(folder, config.adapter)
    task = create_task(config.data, config.training, model_options=model_options)
    if task.auto_class != auto_class:
        raise ConfigError(
            f"task_name is {task.name}, which needs {task.auto_class}, and {folder} was trained as {auto_class}; drop --task_name"
        )
    # What else trained than adapters is copied into whole parameters.
    in_parts = settings is not None and config.adapter.has_adapters and config.adapter.head_modules is None
    base = backbone.load_backbone(
        config.model,
        auto_class=auto_class,
        options=model_options,
        seed=config.training.seed,
        device_type=device.type,
        compute_dtype=dtype,
        partitioned=attachment.partitioning(config, settings, world, device) if in_parts and settings else None,
    )
    if with_adapter:
        model = attachment.load(base, folder, config.adapter, dtype, allow_other_backbone=options.allow_other_backbone)
    else:
        model = base.model
        models.cast_parameters(model, dtype)
    model.eval().requires_grad_(False)
    if options.inference_level is not None:
        models.set_inference_level(model, options.inference_level)
    router = models.route_experts(model, config.training.seed)
    partitioned = settings is not None and settings.stage == 3
    if settings is not None and partitioned:
        distributed.form_group(world, device)
        model = partition_for_inference(model, settings, device)
    else:
        model.to(device)
    evaluator = Evaluator(
        task,
        batch_size=batch_size,
        pad_token_id=int(base.tokenizer.pad_token_id),
        device=device,
        world_size=world.world_size,
        rank=world.rank,
        before_batch=router.evaluation_batch if router else None,
    )
    return SavedRun(folder, config, task, model, base.tokenizer, evaluator, device, precision, partitioned)


def _check_finished(folder: Path) -> None:
    if (folder / adapter_folder.CONFIG_FILE).is_file():
        return
    store = CheckpointStore(folder)
    # Those of older versions have no manifest to be verified by.
    unverified = [one for one in store.checkpoints() if (one.path / adapter_folder.CONFIG_FILE).is_file()]
    newest = store.newest_good().checkpoint or (unverified[-1] if unverified else None)
    remedy = (
        f"name its newest checkpoint: {newest.path}"
        if newest
        else "it saved no checkpoint either; train again, with --overwrite_output_dir or in another folder"
    )
    raise CheckpointError(f"the run in {folder} did not finish: it holds no {adapter_folder.CONFIG_FILE}; {remedy}")


def _check_whole(folder: Path) -> None:
    """A checkpoint says of every file what it was written with: what was altered since is no result of the run."""
    problems = verify(folder) if (folder / MANIFEST_FILE).exists() else []
    if problems:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}; name another checkpoint, or the run's own folder")


def splits_named(task: Task, asked: str | None, prefix: str) -> Sequence[str]:
    """The split asked for, or all whose names start with prefix. Raises ConfigError where there is none."""
    there = list(task.splits())
    chosen = [asked] if asked in there else [] if asked else [name for name in there if name.startswith(prefix)]
    if not chosen:
        raise ConfigError(
            f"no split {asked or prefix} among the data (found: {', '.join(there) or 'none'}); choose one with --split, or name files with "
            "--validation_file, --test_file or --data_dir"
        )
    return chosen
