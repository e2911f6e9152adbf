"""Ours or PEFT's: how a method's adapters get into a backbone, into a folder, and back. The one place that tells them apart."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from adakron import adapter_folder, adapter_io, causal, distributed, models, randomness
from adakron.backbone import Backbone
from adakron.config import AdapterConfig, RunConfig
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.engine.partitioning import partitioned_loading
from adakron.errors import ConfigError
from adakron.fingerprint import BackboneFingerprint, take_fingerprint
from adakron.launcher import World
from adakron.methods import METHODS
from adakron.nn import DropoutMasks
from adakron.nn.routing import Router
from adakron.trainable import AdaptedModelInfo

if TYPE_CHECKING:
    from adakron.peft.methods import Attached


class FolderWriter(Protocol):
    """Writes what a run trained, with all that the folder says beside it. backbone: taken before training."""

    @property
    def backbone(self) -> BackboneFingerprint:
        """What trains on top of it."""

    def write(
        self, folder: Path, trained: Mapping[str, Tensor], *, auto_class: str, model_options: Mapping[str, Any], merge: bool = False
    ) -> None:
        """trained: every trained tensor, whole, by its name in the model. merge: average the experts of a mixture into one.

        auto_class, model_options: see `adapter_io.save_adapter`, which says what is raised, too.
        """


@dataclass(frozen=True)
class OurFolder:
    """Of a method of ours. kept: see `models.adapter_buffers`. backbone: taken before training."""

    config: AdapterConfig
    info: AdaptedModelInfo
    kept: Mapping[str, Tensor]
    base_model: str
    backbone: BackboneFingerprint

    def write(
        self, folder: Path, trained: Mapping[str, Tensor], *, auto_class: str, model_options: Mapping[str, Any], merge: bool = False
    ) -> None:
        """See `FolderWriter`."""
        tensors, config = {**trained, **self.kept}, self.config
        if merge:
            tensors, config = adapter_io.merge_experts(tensors, config, self.info.sites)
        adapter_io.save_adapter(
            folder, tensors=tensors, adapter=config, info=self.info, base_model=self.base_model, auto_class=auto_class,
            model_options=model_options, backbone=self.backbone,
        )  # fmt: skip


@dataclass(frozen=True)
class PeftFolder:
    """Of a method of PEFT's. backbone: taken before training."""

    attached: "Attached"
    base_model: str
    backbone: BackboneFingerprint

    def write(
        self, folder: Path, trained: Mapping[str, Tensor], *, auto_class: str, model_options: Mapping[str, Any], merge: bool = False
    ) -> None:
        """See `FolderWriter`."""
        from adakron.peft import folders

        assert not merge, "RunConfig refuses merge_experts for methods without experts"
        folders.save(
            folder, self.attached, tensors=trained, base_model=self.base_model, auto_class=auto_class, model_options=model_options,
            backbone=self.backbone,
        )  # fmt: skip


@dataclass(frozen=True)
class Attachment:
    """A backbone whose adapters and head train.

    model: what the engine trains. info: what of it trains. vectors: see `trainable.trainable_groups`. router: of a mixture.
    """

    model: nn.Module
    info: AdaptedModelInfo
    vectors: tuple[str, ...]
    router: Router | None
    folder: FolderWriter


def check_method(config: AdapterConfig, settings: DeepSpeedSettings) -> None:
    """ConfigError where the method is unknown, not installed, given settings that it does not have, or not made for this JSON."""
    if config.preset is None:
        _require_peft(config)
        from adakron.peft.method_settings import check_run, method_config

        method_config(config)
        check_run(config, settings.stage, settings.precision)


def partitioning(
    config: RunConfig, settings: DeepSpeedSettings, world: World, device: torch.device
) -> contextlib.AbstractContextManager[None] | None:
    """What the backbone's weights are read in, so that ZeRO stage 3 has them partitioned from the start; None: read whole.

    PEFT's methods get a whole backbone at every stage, for their initialisations may read weights. Entering forms the group: the other
    ranks wait for one that fails after it, and a signal still ends its rank at once (`SignalListener.defer` comes later).
    """
    if settings.stage < 3 or config.adapter.preset is None:
        return None
    return _partitioned(settings, world, device, timedelta(minutes=config.training.timeout_minutes))


@contextlib.contextmanager
def _partitioned(settings: DeepSpeedSettings, world: World, device: torch.device, timeout: timedelta) -> Iterator[None]:
    distributed.form_group(world, device, timeout)
    with partitioned_loading(settings, device):
        yield


def mask_dropout(model: nn.Module, config: RunConfig) -> DropoutMasks | None:
    """Dropout from masks of examples, where the settings have it so. Packed rows are no examples, and have no dropout to mask."""
    if config.training.dropout_masks != "per_example" or config.data.pack:
        return None
    return randomness.mask_dropout(model, config.training.seed)


def attach(base: Backbone, config: AdapterConfig, seed: int, dtype: torch.dtype) -> Attachment:
    """Put the method's adapters into the backbone, for a run of that precision; ConfigError where they do not fit."""
    # Before anything trains: bitfit and full change what it samples.
    fingerprint = take_fingerprint(base.model, base.tokenizer)
    if config.preset is None:
        from adakron.peft.methods import attach as attach_peft

        attached = attach_peft(base.model, config, seed=seed, new_parameters=base.new_parameters, dtype=dtype)
        causal.accept_targets(attached.model)
        return Attachment(attached.model, attached.info, attached.vectors, None, PeftFolder(attached, base.name, fingerprint))
    info = models.adapt(base.model, config, seed=seed, new_parameters=base.new_parameters)
    causal.accept_targets(base.model)
    folder = OurFolder(config, info, models.adapter_buffers(base.model, info), base.name, fingerprint)
    return Attachment(base.model, info, (), models.route_experts(base.model, seed), folder)


def draws_noise(config: AdapterConfig) -> bool:
    """Whether a method of PEFT's draws numbers of its own in training, besides dropout's."""
    if config.preset is not None:
        return False
    from adakron.peft.method_settings import DRAWS_NOISE

    return config.method in DRAWS_NOISE


def read_head(folder: Path, config: AdapterConfig) -> tuple[str, dict[str, Any]]:
    """auto_class and model_options of a saved folder: what builds its head again."""
    if config.preset is None:
        _require_peft(config)
        from adakron.peft import folders

        content = folders.read_backbone(folder)
        return content["auto_class"], content["model_options"]
    saved = adapter_folder.read_adapter_config(folder)
    return saved.auto_class, saved.model_options


def load(base: Backbone, folder: Path, config: AdapterConfig, dtype: torch.dtype, *, allow_other_backbone: bool) -> nn.Module:
    """The backbone with a saved folder's adapters and head, in the precision that its run had.

    allow_other_backbone: see `adapter_io.check_backbone`.
    """
    if config.preset is None:
        from adakron.peft import folders

        folders.check_backbone(base.model, folder, tokenizer=base.tokenizer, allow_other_backbone=allow_other_backbone)
        loaded: nn.Module = folders.load(base.model, folder, dtype)
    else:
        adapter_io.load_into(base.model, folder, tokenizer=base.tokenizer, allow_other_backbone=allow_other_backbone)
        loaded = base.model
    models.cast_parameters(loaded, dtype)
    causal.accept_targets(loaded)
    return loaded


def _require_peft(config: AdapterConfig) -> None:
    # An optional extra, imported where one of its methods is asked for and nowhere else.
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ConfigError(
            f"method {config.method!r} is none of ours ({', '.join(METHODS)}), and PEFT, which has more, is not installed; choose"
            " another --method, or pip install 'adakron[peft]'"
        ) from error
