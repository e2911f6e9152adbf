"""Which model is the backbone, and what its configuration says of it; reads no weights."""

import copy
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from adakron.config import ModelConfig
from adakron.errors import ConfigError
from adakron.packaged import PACKAGED_MINILM, packaged_minilm
from adakron.pretrained import hub_arguments, quiet_transformers, reading, reason_of
from adakron.quantization import check_quantization
from adakron.tokenizer import POSITIONS_FROM_PADDING


def resolve_backbone(config: ModelConfig) -> str:
    """The backbone's local folder (absolute) or hub id, without reading weights; ConfigError where it cannot be a backbone."""
    name = config.model_name_or_path
    if name is None or is_packaged(name):
        return str(packaged_minilm())
    folder = Path(name).expanduser()
    if folder.is_dir():
        problems = _folder_problems(folder)
        if problems:
            raise ConfigError(problems)
        return str(folder.absolute())
    if folder.exists():
        raise ConfigError(f"model_name_or_path is the file {name}; it must be a folder or a hub id (set --model_name_or_path)")
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or not name.strip():
        raise ConfigError(f"the model folder {name!r} does not exist (set --model_name_or_path to a folder or a hub id)")
    return name


_MOST_LAYERS = 2000
"""Of a model that is built: ten times what the deepest published ones have, and seconds of work."""

_ENCODER_DECODER_CLASSES = ("AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM")
"""Auto classes whose models make the decoder's input themselves, from the text or from the targets."""


def load_config(config: ModelConfig, options: Mapping[str, Any], auto_class: str | None = None) -> PreTrainedConfig:
    """The architecture's configuration with the task's options and the dropout override applied; reads no weights.

    options: num_labels, id2label, label2id, problem_type, as they apply.
    auto_class: what will be built from it, where that is known.
    Raises ConfigError on a folder that cannot be read, on an architecture that reads no text, and on an encoder-decoder in a
    class that wants its decoder's input from outside (AutoModel) or is not meant for it.
    """
    check_quantization(config)
    path = resolve_backbone(config)
    with reading("configuration", path, "--model_name_or_path"):
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(path, **hub_arguments(config, path), **options)
    counts = {name: value for name, value in vars(loaded).items() if "layers" in name and isinstance(value, int)}
    deep = [f"{name} {value}" for name, value in counts.items() if value > _MOST_LAYERS]
    if deep:
        raise ConfigError(f"config.json of {path} says {', '.join(deep)}; at most {_MOST_LAYERS} are built (set --model_name_or_path)")
    unsupported = ""
    if getattr(loaded, "vocab_size", None) is None:
        unsupported = "is no text model: its configuration has no vocab_size"
    elif auto_class == "AutoModelForCausalLM" and _is_encoder(loaded):
        unsupported = "is an encoder, whose tokens see those behind them, so that it would predict each target from itself"
    elif loaded.is_encoder_decoder and auto_class is not None and auto_class not in _ENCODER_DECODER_CLASSES:
        unsupported = f"is an encoder-decoder, which is trained as {' or '.join(_ENCODER_DECODER_CLASSES)} only, not as {auto_class}"
    if unsupported:
        raise ConfigError(
            f"model type {loaded.model_type!r} ({path}) is not supported: it {unsupported}; the backbone must be an encoder like BERT, a"
            " decoder like GPT-2 or an encoder-decoder like T5 (set --model_name_or_path)"
        )
    if config.dropout is not None:
        for name, value in list(loaded.to_dict().items()):
            # None, as in classifier_dropout, means "as hidden_dropout_prob"; booleans are switches, not probabilities.
            number_or_none = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
            if number_or_none and re.search(r"dropout|pdrop", name):
                setattr(loaded, name, config.dropout)
    return loaded


def _is_encoder(architecture: PreTrainedConfig) -> bool:
    """Whether the architecture was made to fill in masked tokens, and is not configured to see none behind them."""
    # BART's own check comes after this one.
    masked = architecture.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not architecture.is_encoder_decoder
    return masked and not getattr(architecture, "is_decoder", False)


def check_attention(config: ModelConfig, architecture: PreTrainedConfig, auto_class: str) -> None:
    """ConfigError where the attention code that was asked for is not installed, or not written for this architecture.

    Found by building the model on the meta device, which costs no memory. The architecture is one that `auto_class` can build.
    """
    if config.attn_implementation is None:
        return
    with quiet_transformers(), torch.device("meta"):
        try:
            # A copy: from_config writes its arguments into the configuration.
            model_class(auto_class).from_config(
                copy.deepcopy(architecture), attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code
            )
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"attn_implementation {config.attn_implementation} cannot be used for model type {architecture.model_type!r} here:"
                f" {reason_of(error)} (set --attn_implementation to another, or drop it)"
            ) from error


def position_limit(architecture: PreTrainedConfig) -> int:
    """Longest input, in tokens, that the model has positions for; a very large number where its positions are relative.

    Rotary positions could go on, but end where the model was made to end. The two extra rows of OPT's and BART's tables come on
    top of max_position_embeddings, so they take nothing away from it.
    """
    positions = getattr(architecture, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0 or not getattr(architecture, "position_biased_input", True):
        return sys.maxsize
    if architecture.model_type in POSITIONS_FROM_PADDING:
        return positions - (architecture.pad_token_id or 0) - 1
    # MPNet's code numbers them from 2 on, whatever the padding token.
    return positions - 2 if architecture.model_type == "mpnet" else positions


def model_class(auto_class: str) -> Any:
    """The transformers Auto class of that name."""
    found = getattr(transformers, auto_class, None)
    if not auto_class.startswith("AutoModel") or found is None:
        raise ConfigError(
            f"{auto_class!r} is not an AutoModel class of transformers {transformers.__version__}; the auto_class of an adapter's"
            " configuration must be one"
        )
    return found


def _folder_problems(folder: Path) -> list[str]:
    if (folder / "adapter_config.json").is_file():
        return [f"{folder} holds an adapter, not a backbone (set --model_name_or_path to the adapter's base model)"]
    # Libraries would wait for a pipe, and read a device for ever.
    special = [path.name for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())]
    problems = [f"{name} in the model folder {folder} is no regular file (set --model_name_or_path)" for name in sorted(special)]
    if not (folder / "config.json").is_file():
        problems.append(f"the model folder {folder} has no config.json (set --model_name_or_path)")
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        problems.append(f"the model folder {folder} has no weights, model.safetensors or pytorch_model.bin (set --model_name_or_path)")
    return problems


def is_packaged(name: str | None) -> bool:
    """Whether a model_name_or_path means the MiniLM that a package carries. A folder of that name wins, as folders do over hub ids."""
    return name is None or (name == PACKAGED_MINILM and not Path(name).is_dir())
