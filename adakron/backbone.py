"""Find and load the frozen backbone with its tokenizer, and say which modules are its task head.

Everything a user can get wrong about a model folder ends here, in one ConfigError, instead of a traceback from a library.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from adakron.architecture import check_attention, is_packaged, load_config, model_class, position_limit, resolve_backbone
from adakron.config import ModelConfig
from adakron.errors import ConfigError
from adakron.packaged import PACKAGED_MINILM
from adakron.pretrained import hub_arguments, quiet_transformers, reading
from adakron.quantization import quantization_config
from adakron.tokenizer import agree_on_padding, check_end_token, load_tokenizer


@dataclass(frozen=True)
class NewParameters:
    """Names of the parameters of a loaded model that no training has reached yet; all of them lie in the head.

    missing: not in the checkpoint, or of another shape there, so they hold random values; frozen, they would for ever.
    unused: in the checkpoint, but its training never used them (`_unused_pooler`); they train by default, and may stay frozen.
    """

    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, sorted."""
        return tuple(sorted({*self.missing, *self.unused}))


@dataclass(frozen=True)
class Backbone:
    """A loaded model with its head.

    model: in evaluation mode, on the CPU, nothing frozen yet.
    path: the local folder, absolute, or the hub id it came from.
    name: what to record as the base model: `path`, but independent of the machine for the packaged encoder.
    new_parameters: what the checkpoint does not hold, or its training never used.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str
    name: str
    new_parameters: NewParameters


def load_backbone(
    config: ModelConfig,
    *,
    auto_class: str,
    options: Mapping[str, Any],
    seed: int,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    partitioned: AbstractContextManager[None] | None = None,
) -> Backbone:
    """Load backbone, head and tokenizer.

    auto_class: name of the transformers Auto class, e.g. AutoModelForSequenceClassification.
    options: see `load_config`.
    seed: of the parameters that the checkpoint does not hold; the global random state is neither used nor moved.
    dtype: of all parameters, whatever the checkpoint's. device_type: where the model will run; decides the attention code
    where the settings leave it open.
    compute_dtype: the run's, in which quantised layers compute.
    partitioned: entered around the reading of the weights, where ZeRO stage 3 partitions them as they come; what can be wrong
    with them is found before it is entered.
    A decoder without a padding token (GPT-2, Llama) gets its end-of-sequence token for it: its classifier then reads the last
    token that is not padding, so a text should not itself end in that token. The classifier of an encoder-decoder reads the
    decoder at the last end-of-sequence token and needs equally many in each row: the tokenizer adds them, after truncation, and
    a text that spells such a token out is an error of transformers' in the forward pass.
    """
    path = resolve_backbone(config)
    architecture = load_config(config, options, auto_class)
    tokenizer = load_tokenizer(config, path, architecture)
    agree_on_padding(tokenizer, architecture)
    if architecture.is_encoder_decoder and auto_class == "AutoModelForSequenceClassification":
        check_end_token(tokenizer, architecture)
    tokenizer.model_max_length = min(tokenizer.model_max_length, position_limit(architecture))
    check_attention(config, architecture, auto_class)
    twice = partitioned is not None or config.quantization is not None
    read = partial(_read_weights, config, path, auto_class, architecture, seed, dtype, device_type)
    # First without values where transformers would report less: nothing unexpected or mismatched at ZeRO stage 3; and where the
    # head must be known before, which is not quantised.
    model, loading = read(device_map={"": "meta"}) if twice else read()
    parameters = {name for name, _ in model.named_parameters()}
    mismatched = {key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]}
    new = tuple(sorted(parameters & ({*loading["missing_keys"]} | mismatched)))
    unused = tuple(sorted(set(_unused_pooler(model, config, path)) - {*new}))
    heads = head_modules(model, new)
    random_backbone = [name for name in new if not is_inside(name, heads)]
    problems = []
    if random_backbone:
        problems.append(
            f"the checkpoint {path} does not fit {type(model).__name__}: {len(random_backbone)} parameters of the frozen part would be"
            f" random, e.g. {', '.join(random_backbone[:4])} (set --model_name_or_path to a complete checkpoint of this architecture)"
        )
    dropped = _dropped_layers(model, loading["unexpected_keys"])
    if dropped:
        problems.append(
            f"the checkpoint {path} holds {len(dropped)} parameters of layers that its config.json does not describe, e.g."
            f" {', '.join(dropped[:4])}; they would be dropped (correct num_hidden_layers there, or set --model_name_or_path to a folder"
            " whose configuration fits its weights)"
        )
    if problems:
        raise ConfigError(problems)
    if len(tokenizer) > _vocabulary(model):
        raise ConfigError(
            f"the tokenizer knows {len(tokenizer)} tokens, the backbone's embedding only {_vocabulary(model)}: they do not belong"
            " together (set --tokenizer_name, or drop it)"
        )
    if twice:
        quantized = quantization_config(config, head_modules(model, {*new, *unused}), compute_dtype)
        with partitioned or contextlib.nullcontext():
            model, _ = read() if quantized is None else read(quantization_config=quantized)
    name = PACKAGED_MINILM if is_packaged(config.model_name_or_path) else path
    return Backbone(model, tokenizer, path, name, NewParameters(new, unused))


def _read_weights(
    config: ModelConfig,
    path: str,
    auto_class: str,
    architecture: PreTrainedConfig,
    seed: int,
    dtype: torch.dtype,
    device_type: str,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report of what of the checkpoint it used."""
    with reading("weights", path, "--model_name_or_path"), quiet_transformers(), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would reseed the accelerators as well, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        model, loading = model_class(auto_class).from_pretrained(
            path,
            config=architecture,
            dtype=dtype,
            # torch 2.13's fused attention is slower than plain matrix products on a CPU, most of all its backward in bf16.
            attn_implementation=config.attn_implementation or ("eager" if device_type == "cpu" else None),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
            **hub_arguments(config, path),
        )
    return model, loading


# Tables that older checkpoints carry and newer code computes.
_BUFFERS = re.compile(r".*(position_ids|token_type_ids|inv_freq|masked_bias|attn\.(attention\.)?bias)")


def _dropped_layers(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """The unexpected names that belong to a numbered layer of the backbone; heads of other tasks and poolers do not."""
    children = [name for name, _ in model.base_model.named_children()]
    found = []
    for key in sorted(unexpected):
        name = key.removeprefix(f"{model.base_model_prefix}.")
        if is_inside(name, children) and re.search(r"\.\d+\.", name) and not _BUFFERS.fullmatch(name):
            found.append(key)
    return found


def _unused_pooler(model: PreTrainedModel, config: ModelConfig, path: str) -> list[str]:
    """The pooler's parameters, where the checkpoint's own training never used the pooler.

    A sentence-transformers model (it has a modules.json) pools token vectors by itself: the pooler in its checkpoint is what
    an earlier initialisation left. Frozen, it hides the encoder from the classifier: MiniLM then learns nothing of CoLA.
    """
    marker = cached_file(
        path,
        "modules.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments(config, path),
    )
    pooler = getattr(model.base_model, "pooler", None)
    if marker is None or pooler is None:
        return []
    own = {id(parameter) for parameter in pooler.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def head_modules(model: PreTrainedModel, new_parameters: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the modules that are trained whole: those outside the encoder or decoder, and a pooler that is new.

    A pretrained pooler inside the backbone (BERT's) stays frozen, as in the published code; one that the checkpoint does not
    hold, or that its training never used (sentence-transformers models), would stay random for ever, so it is trained. A
    vocabulary projection (language models) is no task head, and neither is a module all of whose parameters are the
    backbone's own.
    """
    base = model.base_model
    vocabulary = model.get_output_embeddings()
    names = []
    if base is not model:
        shared = {id(parameter) for parameter in base.parameters()}
        for name, child in model.named_children():
            own = [parameter for parameter in child.parameters() if id(parameter) not in shared]
            if child is not base and own and all(module is not vocabulary for module in child.modules()):
                names.append(name)
    pooler = next((name for name, module in model.named_modules() if module is getattr(base, "pooler", None)), None)
    if pooler is not None and pooler not in names and any(is_inside(name, [pooler]) for name in new_parameters):
        names.append(pooler)
    return tuple(names)


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether the parameter or module of that name lies in one of the modules (or is one)."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _vocabulary(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else model.config.vocab_size
