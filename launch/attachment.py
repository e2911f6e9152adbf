"""Ours or PEFT's: how a method's adapters get into a backbone, into a folder, and back. The one place that tells them apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adakron import adapter_folder, adapter_io, models
from adakron.backbone import Backbone
from adakron.config import AdapterConfig
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.errors import ConfigError
from adakron.fingerprint import BackboneFingerprint, take_fingerprint
from adakron.nn.routing import Router
from adakron.trainable import AdaptedModelInfo


@dataclass(frozen=True)
class Attachment:
    """A backbone whose adapters and head train.

    model: what the engine trains. info: what of it trains. vectors: see `trainable.trainable_groups`. router: of a mixture.
    write: writes a folder (folder, trained tensors, whether experts are merged; auto_class and model_options by name).
    """

    model: nn.Module
    info: AdaptedModelInfo
    vectors: tuple[str, ...]
    router: Router | None
    write: Callable[..., None]


def check_method(config: AdapterConfig, settings: DeepSpeedSettings) -> None:
    """ConfigError where the method is unknown, not installed, given settings that it does not have, or not made for this JSON."""
    if config.preset is None:
        _require_peft(config)
        from adakron.peft.method_settings import check_run, method_config

        method_config(config)
        check_run(config, settings.stage, settings.precision)


def attach(base: Backbone, config: AdapterConfig, seed: int, dtype: torch.dtype) -> Attachment:
    """Put the method's adapters into the backbone, for a run of that precision; ConfigError where they do not fit."""
    # Before anything trains: bitfit and full change what it samples.
    fingerprint = take_fingerprint(base.model, base.tokenizer)
    if config.preset is None:
        from adakron.peft.methods import attach as attach_peft

        attached = attach_peft(base.model, config, seed=seed, new_parameters=base.new_parameters, dtype=dtype)
        return Attachment(attached.model, attached.info, attached.vectors, None, partial(_write_peft, attached, base.name, fingerprint))
    info = models.adapt(base.model, config, seed=seed, new_parameters=base.new_parameters)
    kept = models.adapter_buffers(base.model, info)
    return Attachment(
        base.model, info, (), models.route_experts(base.model, seed), partial(_write_ours, config, info, kept, base.name, fingerprint)
    )


def _write_ours(
    config: AdapterConfig,
    info: AdaptedModelInfo,
    kept: Mapping[str, Tensor],
    base_model: str,
    fingerprint: BackboneFingerprint,
    folder: Path,
    trained: Mapping[str, Tensor],
    merge: bool,
    **head: Any,
) -> None:
    tensors = {**trained, **kept}
    if merge:
        tensors, config = adapter_io.merge_experts(tensors, config, info.sites)
    adapter_io.save_adapter(folder, tensors=tensors, adapter=config, info=info, base_model=base_model, backbone=fingerprint, **head)


def _write_peft(
    attached: Any,
    base_model: str,
    fingerprint: BackboneFingerprint,
    folder: Path,
    trained: Mapping[str, Tensor],
    merge: bool,
    **head: Any,
) -> None:
    from adakron.peft import folders

    assert not merge, "AdapterConfig refuses merge_experts for methods without experts"
    folders.save(folder, attached, tensors=trained, base_model=base_model, backbone=fingerprint, **head)


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
    return loaded


def _require_peft(config: AdapterConfig) -> None:
    # An optional extra, imported where one of its methods is asked for and nowhere else.
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ConfigError(
            f"method {config.method!r} is none of ours ({', '.join(models.METHODS)}), and PEFT, which has more, is not installed; choose"
            " another --method, or pip install 'adakron[peft]'"
        ) from error
