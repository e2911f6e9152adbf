"""What an adapter folder's `adapter_config.json` says: PEFT's fields, the adapter's settings, how to build the head again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from adakron.config import AdapterConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import BackboneFingerprint
from adakron.untrusted import UnreadableError, read_json

CONFIG_FILE = "adapter_config.json"


WEIGHTS_FILE = "adapter_model.safetensors"


PEFT_TYPE = "ADAKRON"


FORMAT_VERSION = 2
"""Version 1 had no mixtures and no relatives; its folders are read, the newer settings being at their defaults."""


_KINDS: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "auto_class": (str,),
    "model_options": (dict,),
    "extra": (dict,),
    "modules_to_save": (list,),
    "target_modules": (list,),
    "tuned_parameters": (list,),
}


_KIND_NAMES = {
    str: "a string",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


_NEW_IN_2 = ("method_config", "num_experts", "experts_in", "expert_scores", "tune_expert_scores", "inference_level",
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


def read_adapter_config(folder: str | Path) -> AdapterFolder:
    """Read and check the configuration of an adapter folder; CheckpointError naming everything that is wrong with it."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}")
    try:
        content = read_json(path)
    except (OSError, UnreadableError) as error:
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
