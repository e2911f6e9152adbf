"""Save and load what was trained, in PEFT's on-disk layout.

A folder holds `adapter_model.safetensors` (float32 tensors of adapters and head, named "base_model.model." + the parameter's
name) and `adapter_config.json` (PEFT's fields, the adapter's settings, and what is needed to build the same head again).
Nothing here pickles or unpickles.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adakron.backbone import is_inside
from adakron.config import AdapterConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import BackboneFingerprint, backbone_differences
from adakron.models import AdaptedModelInfo, adapt
from adakron.nn import PROJECTIONS, AdaptedLayer

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
PEFT_TYPE = "ADAKRON"
FORMAT_VERSION = 2
"""Version 1 had no mixtures and no relatives; its folders are read, the newer settings being at their defaults."""

# PEFT's names of the tasks. Further classes are saved without one, which PEFT reads as "any model".
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": "FEATURE_EXTRACTION",
}

_KINDS: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "auto_class": (str,),
    "model_options": (dict,),
    "extra": (dict,),
    "modules_to_save": (list,),
    "target_modules": (list,),
    "tuned_parameters": (list,),
}
_KIND_NAMES = {str: "a string", dict: "an object", list: "a list", int: "a whole number", float: "a number", type(None): "null"}

_NEW_IN_2 = ("method_config", "num_experts", "experts_in", "expert_scores", "tune_expert_scores", "inference_level", "merge_experts",
             "position", "exclude_modules", "layers")  # fmt: skip


@dataclass(frozen=True)
class AdapterFolder:
    """The contents of an adapter_config.json.

    base_model: folder or hub id of the backbone (or the name of the packaged one), for --model_name_or_path.
    auto_class, model_options: what builds the same head again, as `load_backbone` takes them.
    head_modules, sites, tuned_parameters: what is saved, see `AdaptedModelInfo`.
    backbone: what it was trained on; None in folders that older releases wrote. extra: whatever the run added.
    """

    adapter: AdapterConfig
    base_model: str
    auto_class: str
    model_options: dict[str, Any]
    head_modules: tuple[str, ...]
    sites: tuple[str, ...]
    tuned_parameters: tuple[str, ...]
    extra: dict[str, Any]
    backbone: BackboneFingerprint | None = None


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
        "task_type": TASK_TYPES.get(auto_class),
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
    _publish(folder / WEIGHTS_FILE, safetensors.torch.save(weights, metadata={"format": "pt"}))
    _publish(folder / CONFIG_FILE, text.encode())


def read_adapter_config(folder: str | Path) -> AdapterFolder:
    """Read and check the configuration of an adapter folder; CheckpointError naming everything that is wrong with it."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    if content.get("peft_type") != PEFT_TYPE:
        raise CheckpointError(f"{path}: peft_type is {content.get('peft_type')!r}, it must be {PEFT_TYPE!r}; load other adapters with PEFT")
    if content.get("format_version") == 1:
        content = {**{name: getattr(AdapterConfig(), name) for name in _NEW_IN_2}, "tuned_parameters": [], **content}
    elif content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {content.get('format_version')!r}, this release reads 1 to {FORMAT_VERSION};"
            " use the release that wrote it"
        )
    adapter, problems = _adapter_settings(content)
    problems = _kind_problems(content, _KINDS) + problems
    for key in ("modules_to_save", "target_modules", "tuned_parameters"):
        if isinstance(content.get(key), list) and not all(isinstance(name, str) for name in content[key]):
            problems.append(f"{key} must list names, got {content[key]!r}")
    fingerprint = None
    if content.get("backbone") is not None:
        try:
            fingerprint = BackboneFingerprint.from_dict(content["backbone"])
        except CheckpointError as error:
            problems.append(str(error))
    if isinstance(content.get("model_options"), dict):
        problems += _label_problems(content["model_options"], content.get("auto_class"))
    if problems or adapter is None:
        raise CheckpointError(f"{path}: " + "; ".join(problems))
    options = dict(content["model_options"])
    if "id2label" in options:
        # JSON has no integer keys.
        options["id2label"] = {int(label): name for label, name in options["id2label"].items()}
    return AdapterFolder(
        adapter=adapter,
        base_model=content["base_model_name_or_path"],
        auto_class=content["auto_class"],
        model_options=options,
        head_modules=tuple(content["modules_to_save"]),
        sites=tuple(content["target_modules"]),
        tuned_parameters=tuple(content["tuned_parameters"]),
        extra=content["extra"],
        backbone=fingerprint,
    )


def _adapter_settings(content: Mapping[str, Any]) -> tuple[AdapterConfig | None, list[str]]:
    """The adapter's settings, or what is wrong with them."""
    keys = {name: "target_pattern" if name == "target_modules" else name for name in AdapterConfig.__dataclass_fields__}
    # What a Literal allows is checked by AdapterConfig itself, the kinds of the other values are not.
    hints = {keys[name]: hint for name, hint in get_type_hints(AdapterConfig).items()}
    problems = _kind_problems(content, {key: _kinds_of(hint) for key, hint in hints.items()})
    if problems:
        return None, problems
    try:
        return AdapterConfig(**{name: content[key] for name, key in keys.items()}).resolved(), []
    except ConfigError as error:
        return None, error.problems


def _kinds_of(hint: Any) -> tuple[type, ...]:
    options = get_args(hint) or (hint,)
    return () if Literal in (get_origin(hint), *map(get_origin, options)) else options


def _kind_problems(content: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> list[str]:
    """Which keys are missing or hold a value of none of their kinds; no kinds: any value."""
    problems = []
    for key, allowed in kinds.items():
        if key not in content:
            problems.append(f"{key} is missing")
        # type() and not isinstance: true is no number.
        elif allowed and type(content[key]) not in (*allowed, *((int,) if float in allowed else ())):
            problems.append(f"{key} must be {' or '.join(_KIND_NAMES[kind] for kind in allowed)}, got {content[key]!r}")
    return problems


def _label_problems(options: Mapping[str, Any], auto_class: Any) -> list[str]:
    """What is wrong with num_labels, id2label and label2id, each by itself and together."""
    kinds: dict[str, tuple[type, ...]] = {"num_labels": (int,), "id2label": (dict,), "label2id": (dict,)}
    needed = set()
    if auto_class == "AutoModelForSequenceClassification":
        needed = {"num_labels"} if options.get("problem_type") == "regression" else {"num_labels", "id2label"}
    problems = _kind_problems(options, {key: kind for key, kind in kinds.items() if key in needed or key in options})
    if problems:
        return [f"model_options: {problem}" for problem in problems]
    count, names, indices = options.get("num_labels"), options.get("id2label"), options.get("label2id")
    if names is not None:
        if set(names) != {str(index) for index in range(len(names))} or not all(isinstance(name, str) for name in names.values()):
            return [f"model_options: id2label must map 0, 1, ... to names, got {names!r}"]
        if count is not None and count != len(names):
            problems.append(f"num_labels is {count}, but id2label has {len(names)} classes")
        if indices is not None and indices != {name: int(index) for index, name in names.items()}:
            problems.append(f"label2id {indices!r} is not the inverse of id2label {names!r}")
    if count is not None and count < 1:
        problems.append(f"num_labels is {count}; it must be at least 1")
    return [f"model_options: {problem}" for problem in problems]


def read_adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The saved tensors, float32 on the CPU, by parameter name of the model; checked to be complete."""
    config = read_adapter_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a complete adapter folder: it has no {WEIGHTS_FILE}")
    try:
        stored = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    foreign = [key for key in stored if not key.startswith(KEY_PREFIX)]
    problems = [f"keys without the prefix {KEY_PREFIX!r}: {', '.join(foreign)}"] if foreign else []
    tensors = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in stored.items() if key not in foreign}
    problems += _coverage_problems(tensors, config.adapter, config.sites, config.head_modules, config.tuned_parameters)
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))
    return tensors


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_other_backbone: bool = False,
) -> AdaptedModelInfo:
    """Put a saved adapter and head into a freshly loaded backbone, or into a model that has adapters of the same make.

    model: not yet wrapped or partitioned by DeepSpeed. Its parameters take the saved values in their own dtype and device.
    tokenizer, allow_other_backbone: see `check_backbone`.
    Raises CheckpointError, listing every missing, unexpected or misshapen tensor; no value is then copied.
    """
    check_backbone(model, folder, tokenizer=tokenizer, allow_other_backbone=allow_other_backbone)
    return load_tensors(model, folder)


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


@torch.no_grad()
def load_tensors(model: PreTrainedModel, folder: str | Path) -> AdaptedModelInfo:
    """`load_adapter` without a look at what the backbone is."""
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
        info = AdaptedModelInfo(present, saved.head_modules, adapters, saved.tuned_parameters)
    else:
        try:
            info = adapt(model, saved.adapter, seed=0, heads=saved.head_modules)
        except ConfigError as error:
            raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {error}") from error
    problems = _site_problems(saved.sites, info.sites)
    parameters: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    expected = {name for name in parameters if _is_saved(name, info)}
    problems += [f"missing {name}" for name in sorted(expected - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected)]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model's is {tuple(parameters[name].shape)}"
        for name in sorted(expected & tensors.keys())
        if tensors[name].shape != parameters[name].shape
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: " + "; ".join(problems))
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    return info


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
    single = replace(
        adapter, num_experts=1, experts_in="", expert_scores="zeros", tune_expert_scores=False, inference_level=3, merge_experts=False
    )
    return merged, single


def _is_saved(name: str, info: AdaptedModelInfo) -> bool:
    adapters = [f"{site}.adakron_adapter" for site in info.sites]
    return is_inside(name, info.head_modules) or is_inside(name, adapters) or name in info.tuned_parameters


def _site_problems(saved: Sequence[str], present: Sequence[str]) -> list[str]:
    problems = [f"the saved adapter at {site} has no place" for site in saved if site not in present]
    return problems + [f"nothing is saved for the adapter at {site}" for site in present if site not in saved]


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


def _publish(path: Path, content: bytes) -> None:
    # The same folder, so that the rename stays inside one file system and is atomic.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
