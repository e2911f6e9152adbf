"""The backbone that a published checkpoint belongs to. Unlike for a run, its folder may be without a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adakron.architecture import load_config, model_class, resolve_backbone
from adakron.backbone import is_inside
from adakron.config import ModelConfig
from adakron.errors import ConfigError
from adakron.placement import some_of
from adakron.pretrained import quiet_transformers, reason_of


def load_base(name: str, *, auto_class: str, options: Mapping[str, Any], heads: tuple[str, ...]) -> PreTrainedModel:
    """The model of that folder or hub id, float32 on the CPU, in evaluation mode; the heads may be new.

    Raises ConfigError where it cannot be read, or does not hold all of its encoder or decoder.
    """
    config = ModelConfig(model_name_or_path=name)
    path = resolve_backbone(config)
    architecture = load_config(config, options)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            model, loading = model_class(auto_class).from_pretrained(
                path,
                config=architecture,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=Path(path).is_dir(),
            )
        # Libraries raise a dozen unrelated classes for an unreadable or unknown model.
        except Exception as error:
            raise ConfigError(f"cannot read the weights of the model {path}: {reason_of(error)} (set --model_name_or_path)") from error
    mismatched = {key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]}
    random = sorted(key for key in {*loading["missing_keys"]} | mismatched if not is_inside(key, heads))
    if random:
        raise ConfigError(
            f"the checkpoint {path} does not hold all of {type(model).__name__}: {some_of(random)} would be random (set"
            " --model_name_or_path to the model that the adapter was trained on)"
        )
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def base_name(name: str) -> str:
    """What an adapter folder records as its base model: a folder by its absolute path, a hub id as it is."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def find_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of that folder or hub id; None where there is none with a vocabulary."""
    path = resolve_backbone(ModelConfig(model_name_or_path=name))
    with quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=Path(path).is_dir())
        except Exception:
            return None
    # Without a vocabulary file transformers 5 makes a tokenizer that knows its special tokens only, and says nothing.
    return tokenizer if len(tokenizer) > len(set(tokenizer.all_special_tokens)) else None
