"""Everything of a training run before its processes join: what the settings mean, the data, the model; wrong input ends it here.

At ZeRO stage 3 with a method of ours the group is formed to read the backbone's weights: flags, JSON, folder, data, method and
architecture are checked before, what the weights and the encoded examples show after it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adakron import backbone, distributed, models, randomness, run_folder, trainable
from adakron.config import RunConfig
from adakron.data.sampler import GlobalBatchSampler
from adakron.determinism import compute_deterministically
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.errors import ConfigError
from adakron.launcher import World
from adakron.log import get_logger
from adakron.nn import native
from adakron.passes import BeforePass
from adakron.placement import some_of
from adakron.run_lock import check_unlocked
from adakron.tasks import create_task
from adakron.tasks.base import EncodedSplit, Task
from adakron.trainable import ParameterReport
from adakron.unpadding import Unpadding, unpad
from adakron.weights import DTYPES
from launch import resuming
from launch.attachment import Attachment, attach, check_method, mask_dropout, partitioning
from launch.checks import asks_for_stage, check_consistency, check_packing, resolve_deepspeed, splits_to_use
from launch.recording import DEFAULT_PARENT, as_recorded
from launch.resuming import Resumption

logger = get_logger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, alike on every rank.

    config: as it is now, with the folder that a resumed run goes on in. recorded: as the run's folder keeps it. encoded: the splits
    that the run uses, by name. layout: ranks, stage, precision. described: what the run's checkpoints say of it (`resuming.describe`).
    """

    config: RunConfig
    recorded: RunConfig
    resumption: Resumption | None
    device: torch.device
    settings: DeepSpeedSettings
    task: Task
    tokenizer: PreTrainedTokenizerBase
    attached: Attachment
    report: ParameterReport
    before_pass: BeforePass | None
    encoded: Mapping[str, EncodedSplit]
    sampler: GlobalBatchSampler
    layout: Mapping[str, Any]
    described: Mapping[str, Any]

    @property
    def pad_token_id(self) -> int:
        """Fills batches up; every tokenizer has one by then (`adakron.tokenizer`)."""
        return int(self.tokenizer.pad_token_id)

    @property
    def evaluations(self) -> dict[str, EncodedSplit]:
        """The splits to score."""
        return {name: split for name, split in self.encoded.items() if name.startswith("validation")}

    @property
    def predictions(self) -> dict[str, EncodedSplit]:
        """The splits to predict once training is over."""
        return {name: split for name, split in self.encoded.items() if name.startswith("test")}


def prepare(config: RunConfig, world: World) -> Prepared:
    """Check and load. Every rank for itself; writes nothing but caches. Raises AdaKronError for everything that the user can mend."""
    if config.training.deterministic:
        compute_deterministically()
    if config.training.do_train is False or (config.training.do_train is None and asks_for_stage(config)):
        raise ConfigError("nothing to train: add --do_train, or use launch/evaluate.py and launch/predict.py on a saved run")
    config, resumption = resuming.find(config)
    device = distributed.select_device(world, os.environ)
    settings = resolve_deepspeed(config, world, device)
    _check_folders(config, resumption)
    check_method(config.adapter, settings)
    task = create_task(config.data, config.training)
    splits = splits_to_use(task, config)
    models.check_architecture(config.model, config.adapter, auto_class=task.auto_class, options=task.model_options())
    base = backbone.load_backbone(
        config.model,
        auto_class=task.auto_class,
        options=task.model_options(),
        seed=config.training.seed,
        device_type=device.type,
        compute_dtype=DTYPES[settings.precision],
        partitioned=partitioning(config, settings, world, device),
    )
    new = base.new_parameters.names
    read = " (the checkpoint's take their place)" if resumption is not None and resumption.checkpoint is not None else ""
    if new:
        logger.info("%d parameters of the head are new%s: %s", len(new), read, some_of(new))
    attached = attach(base, config.adapter, config.training.seed, DTYPES[settings.precision])
    trainable.assert_trainable(attached.model, attached.info)
    check_consistency(config, attached.model)
    check_packing(config, attached.model)
    masks = mask_dropout(attached.model, config)
    unpadding: Unpadding | str | None = unpad(attached.model, masks) if config.training.unpad == "auto" else "--unpad no"
    if isinstance(unpadding, str):
        logger.info("padding is computed: %s", unpadding)
        unpadding = None
    if config.training.kernels == "auto" and device.type == "cpu" and (problem := native.load()):
        logger.info("kernels are torch's: %s", problem)
    if config.training.gradient_checkpointing:
        models.checkpoint_activations(attached.model, attached.router, masks, unpadding)
    encoded = {name: _encoded(task, name, base.tokenizer, config.data.max_seq_length) for name in splits}
    sampler = GlobalBatchSampler(
        encoded["train"].lengths,
        micro_batch=config.training.per_device_train_batch_size,
        global_batch=config.training.examples_per_step(world.world_size),
        world_size=world.world_size,
        rank=world.rank,
        seed=config.training.seed,
    )
    recorded = as_recorded(config, base.name, task)
    layout = {"world_size": world.world_size, "stage": settings.stage, "precision": settings.precision}
    described = resuming.describe(recorded, encoded, attached.folder.backbone, global_batch=sampler.global_batch, layout=layout)
    if resumption is not None:
        resuming.check_same(resumption, described, str(resumption.checkpoint or config.training.output_dir))
    return Prepared(
        config=config,
        recorded=recorded,
        resumption=resumption,
        device=device,
        settings=settings,
        task=task,
        tokenizer=base.tokenizer,
        attached=attached,
        report=trainable.parameter_report(attached.model, attached.info),
        before_pass=randomness.announcer(attached.router, masks),
        encoded=encoded,
        sampler=sampler,
        layout=layout,
        described=described,
    )


def _check_folders(config: RunConfig, resumption: Resumption | None) -> None:
    training = config.training
    if training.output_dir and resumption is not None and resumption.in_place:
        check_unlocked(Path(training.output_dir))
    elif training.output_dir:
        run_folder.check_free(Path(training.output_dir), training.overwrite_output_dir)
    else:
        run_folder.check_writable(DEFAULT_PARENT)
    if training.logging_dir:
        run_folder.check_writable(Path(training.logging_dir))


def _encoded(task: Task, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
    split = task.encode(name, tokenizer)
    if split.truncated:
        logger.info("%d of %d %s examples are longer than %d tokens and were cut", split.truncated, len(split), name, max_length)
    return split
