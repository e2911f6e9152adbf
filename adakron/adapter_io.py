"""Save and load what was trained, in PEFT's on-disk layout.

A folder holds `adapter_model.safetensors` (float32 tensors of adapters and head, named "base_model.model." + the parameter's
name) and `adapter_config.json` (PEFT's fields, the adapter's settings, and what is needed to build the same head again).
Nothing here pickles or unpickles.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adakron.adapter_folder import CONFIG_FILE, FORMAT_VERSION, PEFT_TYPE, WEIGHTS_FILE, read_adapter_config
from adakron.atomic import publish
from adakron.backbone import is_inside
from adakron.config import AdapterConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import BackboneFingerprint, backbone_differences
from adakron.models import adapt
from adakron.nn import PROJECTIONS, AdaptedLayer, BottleneckAdapter
from adakron.placement import some_of
from adakron.tensor_file import read_tensor_file
from adakron.trainable import AdaptedModelInfo, trained_names

log = logging.getLogger(__name__)

KEY_PREFIX = "base_model.model."

# PEFT's names of the tasks. Further classes are saved without one, which PEFT reads as "any model".
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": "FEATURE_EXTRACTION",
}


def saved_task_type(auto_class: str) -> str | None:
    """The task that a folder names to PEFT.

    None for questions: PEFT's model for them (0.21.2) drops token_type_ids, so that an encoder with token types would give other answers
    there than in training; its model for any task passes on everything.
    """
    return None if auto_class == "AutoModelForQuestionAnswering" else TASK_TYPES.get(auto_class)


def save_adapter(
    folder: str | Path,
    *,
    tensors: Mapping[str, Tensor],
    adapter: AdapterConfig,
    info: AdaptedModelInfo,
    base_model: str,
    auto_class: str,
    model_options: Mapping[str, Any],
    backbone: BackboneFingerprint | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter folder; a reader sees each file whole or not at all.

    tensors: every trained tensor, whole (not a ZeRO partition), by its parameter name in the model, and what the adapters hold
    besides (`models.adapter_buffers`); saved as float32.
    info: what trains, as `adapt` returned it. backbone: `take_fingerprint` of the model before it was trained; without it loading
    cannot tell another backbone of the same shape. The other arguments: see `AdapterFolder`; extra must be JSON.
    Raises CheckpointError where the tensors are not exactly those of the adapters and the head, or one is empty.
    """
    adapter = adapter.resolved()
    problems = _coverage_problems(tensors, adapter, info.sites, info.head_modules, info.tuned_parameters)
    problems += [f"tensor {name} is empty (a ZeRO stage 3 partition? gather it first)" for name, t in tensors.items() if t.numel() == 0]
    if problems:
        raise CheckpointError(f"refusing to write {folder}: " + "; ".join(problems))
    # Copies: safetensors refuses tensors that share memory, as views of one flat ZeRO buffer do.
    weights = {
        KEY_PREFIX + name: tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous() for name, tensor in tensors.items()
    }
    settings = adapter.to_dict()
    content = {
        "peft_type": PEFT_TYPE,
        "task_type": saved_task_type(auto_class),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": list(info.sites),
        "modules_to_save": list(info.head_modules),
        "tuned_parameters": list(info.tuned_parameters),
        "format_version": FORMAT_VERSION,
        "auto_class": auto_class,
        "model_options": dict(model_options),
        **{name: value for name, value in settings.items() if name != "target_modules"},
        # PEFT's target_modules holds what was adapted; the expression that chose it, if any, is ours.
        "target_pattern": settings["target_modules"],
        "backbone": None if backbone is None else backbone.to_dict(),
        "extra": dict(extra or {}),
    }
    # Serialised before the first write, so that content that is not JSON leaves no half folder.
    text = json.dumps(content, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration comes last: it is what a reader looks for first.
    with publish(folder / WEIGHTS_FILE) as partial:
        partial.write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))
    with publish(folder / CONFIG_FILE) as partial:
        partial.write_text(text, encoding="utf-8")


def read_adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The saved tensors, float32 on the CPU, by parameter name of the model; checked to be complete."""
    config = read_adapter_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} is not a complete adapter folder: it has no {WEIGHTS_FILE}")
    stored = read_tensor_file(path)
    foreign = [key for key in stored if not key.startswith(KEY_PREFIX)]
    problems = [f"keys without the prefix {KEY_PREFIX!r}: {', '.join(foreign)}"] if foreign else []
    tensors = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in stored.items() if key not in foreign}
    problems += _coverage_problems(tensors, config.adapter, config.sites, config.head_modules, config.tuned_parameters)
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))
    return tensors


@torch.no_grad()
def load_into(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_other_backbone: bool = False,
) -> AdaptedModelInfo:
    """Put a saved adapter and head into a freshly loaded backbone, or into a model that has adapters of the same make.

    model: not yet wrapped or partitioned by DeepSpeed. Its parameters take the saved values in their own dtype and device.
    tokenizer, allow_other_backbone: see `check_backbone`.
    Raises CheckpointError, listing every missing, unexpected or misshapen tensor and every setting in which adapters that are
    there differ from the saved ones (activation, factor_order, experts_in, inference_level); no value is then copied.
    """
    check_backbone(model, folder, tokenizer=tokenizer, allow_other_backbone=allow_other_backbone)
    info, tensors = fit_adapter(model, folder)
    own: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return info


def check_backbone(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_other_backbone: bool = False,
) -> None:
    """Raise CheckpointError, with every difference, where the folder's adapter was trained on another backbone.

    tokenizer: compared as well where it is given. allow_other_backbone: log the differences as a warning instead. A folder
    without a fingerprint fits every backbone, as far as this can tell.
    """
    saved = read_adapter_config(folder)
    if saved.backbone is None:
        return
    found = backbone_differences(saved.backbone, model, tokenizer, loaded_over=(*saved.head_modules, *saved.tuned_parameters))
    report_differences(found, model, folder, saved.base_model, allow_other_backbone=allow_other_backbone)


def report_differences(
    found: Sequence[str], model: PreTrainedModel, folder: str | Path, base_model: str, *, allow_other_backbone: bool
) -> None:
    """Raise CheckpointError with the differences between a folder's backbone and this model, if any, or log them as a warning."""
    if found and allow_other_backbone:
        log.warning("%s was trained on another backbone (%s), its results here are unknown: %s", folder, base_model, "; ".join(found))
    elif found:
        raise CheckpointError(
            f"{folder} was trained on another backbone ({base_model}) than this {type(model).__name__}: {'; '.join(found)} (name"
            " its own backbone with --model_name_or_path, or load it all the same with --allow_other_backbone)"
        )


def fit_adapter(model: PreTrainedModel, folder: str | Path) -> tuple[AdaptedModelInfo, dict[str, Tensor]]:
    """Give the model adapters as the folder's settings say, unless it has them already, and the values to put there, by name.

    The values are on the CPU, one for every parameter that trains and every buffer of the adapters. The model may be on the meta
    device. Raises CheckpointError where they do not fit, or where adapters that are there compute something else.
    """
    saved = read_adapter_config(folder)
    tensors = read_adapter_tensors(folder)
    names = {name for name, _ in model.named_modules()}
    absent = [name for name in (*saved.sites, *saved.head_modules) if name not in names]
    if absent:
        raise CheckpointError(
            f"{folder} does not fit {type(model).__name__}: the model has no module {', '.join(absent[:8])} (saved for {saved.base_model})"
        )
    present = tuple(name for name, module in model.named_modules() if isinstance(module, AdaptedLayer))
    if present:
        prefixes = [f"{site}.adakron_adapter" for site in present]
        adapters = tuple(name for name, _ in model.named_parameters() if is_inside(name, prefixes))
        # Names that the model does not have are among the unexpected tensors below.
        parameters = dict(model.named_parameters())
        tuned = tuple(name for name in saved.tuned_parameters if name in parameters)
        info = AdaptedModelInfo(present, saved.head_modules, adapters, tuned)
    else:
        try:
            info = adapt(model, saved.adapter, seed=0, heads=saved.head_modules)
        except ConfigError as error:
            raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {error}") from error
    problems = _site_problems(saved.sites, info.sites) + _setting_problems(model, present, saved.adapter)
    own: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    buffers = {name for name, _ in model.named_buffers() if is_inside(name, [f"{site}.adakron_adapter" for site in info.sites])}
    expected = trained_names(model, info) | buffers
    problems += [f"missing {name}" for name in sorted(expected - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected)]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in sorted(expected & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: " + "; ".join(problems))
    return info, tensors


def merge_experts(tensors: Mapping[str, Tensor], adapter: AdapterConfig, sites: Sequence[str]) -> tuple[dict[str, Tensor], AdapterConfig]:
    """The adapters with each projection's experts averaged into one by the softmax of their scores; tensors and settings.

    tensors: as `save_adapter` takes them. Evaluation of the result equals that of the mixture at inference_level 3. Raises
    ConfigError where there is one expert already.
    """
    adapter = adapter.resolved()
    if (adapter.num_experts or 1) == 1:
        raise ConfigError(f"nothing to merge: the {adapter.method} adapter has one expert")
    merged = dict(tensors)
    for site in sites:
        for projection in adapter.expert_projections:
            prefix = f"{site}.adakron_adapter.{projection}"
            share_E = torch.softmax(merged.pop(f"{prefix}.expert_scores").double(), dim=0)
            for kind in ("weight", "bias"):
                stack = merged[f"{prefix}.{kind}"]
                merged[f"{prefix}.{kind}"] = torch.tensordot(share_E, stack.double(), dims=1).to(stack.dtype)
    single = replace(adapter, num_experts=1, experts_in="", expert_scores="zeros", tune_expert_scores=False, inference_level=3)
    return merged, single


def _site_problems(saved: Sequence[str], present: Sequence[str]) -> list[str]:
    problems = [f"the saved adapter at {site} has no place" for site in saved if site not in present]
    return problems + [f"nothing is saved for the adapter at {site}" for site in present if site not in saved]


def _setting_problems(model: PreTrainedModel, present: Sequence[str], saved: AdapterConfig) -> list[str]:
    """Where adapters that fit by name and shape would compute something else than the saved ones did."""
    different: dict[tuple[str, object, object], list[str]] = {}
    for site in present:
        adapter = model.get_submodule(f"{site}.adakron_adapter")
        if not isinstance(adapter, BottleneckAdapter):
            continue
        settings: dict[str, tuple[object, object]] = {"activation": (adapter.activation, saved.activation)}
        if adapter.bottleneck == "kronecker":
            settings["factor_order"] = (adapter.factor_order, saved.factor_order)
        if adapter.num_experts > 1:
            # Their order means nothing.
            settings["experts_in"] = (",".join(sorted(adapter.experts_in)), ",".join(sorted(saved.expert_projections)))
            settings["inference_level"] = (adapter.inference_level, saved.inference_level)
        for name, (here, there) in settings.items():
            if here != there:
                different.setdefault((name, here, there), []).append(site)
    return [
        f"{name} is {here} in the adapters at {some_of(sites)}, and was saved as {there}; load into a model without adapters, or adapt it"
        f" with {name} {there}"
        for (name, here, there), sites in different.items()
    ]


def _coverage_problems(
    names: Iterable[str], adapter: AdapterConfig, sites: Sequence[str], head_modules: Sequence[str], tuned_parameters: Sequence[str]
) -> list[str]:
    names = set(names)
    expected = {f"{site}.adakron_adapter.{tensor}" for site in sites for tensor in adapter_tensor_names(adapter)} | {*tuned_parameters}
    missing = sorted(expected - names)
    missing += [f"{head}.*" for head in head_modules if not any(is_inside(name, [head]) for name in names)]
    unknown = sorted(name for name in names - expected if not is_inside(name, head_modules))
    problems = [f"tensors are missing: {', '.join(missing)}"] if missing else []
    return problems + ([f"tensors belong to neither adapters nor head: {', '.join(unknown)}"] if unknown else [])


def adapter_tensor_names(adapter: AdapterConfig) -> list[str]:
    """The tensors of one adapter with these resolved settings, relative to it: "down_a.weight", ..., "up.bias"."""
    names = [f"{projection}.{kind}" for projection in PROJECTIONS[adapter.bottleneck] for kind in ("weight", "bias")]
    return names + [f"{projection}.expert_scores" for projection in adapter.expert_projections]
