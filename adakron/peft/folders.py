"""Folders of PEFT's methods: what PEFT itself writes and reads, and beside it what builds the backbone with its head again."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adakron import run_folder
from adakron.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from adakron.adapter_io import report_differences, saved_task_type
from adakron.atomic import publish
from adakron.backbone import is_inside
from adakron.errors import CheckpointError
from adakron.fingerprint import BackboneFingerprint, backbone_differences
from adakron.peft.methods import ADAPTER_NAME, NAME_PREFIX, Attached, cast_buffers, named_tensors, quiet_peft
from adakron.placement import matched
from adakron.tensor_file import read_tensor_file
from adakron.untrusted import UnreadableError, read_json

_COPIES = ("original_module", "modules_to_save")


def save(
    folder: str | Path,
    attached: Attached,
    *,
    tensors: Mapping[str, Tensor],
    base_model: str,
    auto_class: str,
    model_options: Mapping[str, Any],
    backbone: BackboneFingerprint | None = None,
) -> None:
    """Write adapter and head as PEFT does, and backbone.json.

    tensors: what trained, whole (not a ZeRO partition), by parameter name. The others: see `adakron.adapter_io.save_adapter`.
    Raises CheckpointError where tensors are missing or empty.
    """
    info = attached.info
    needed = {*info.adapter_parameters, *info.tuned_parameters}
    problems = [f"{name} is missing" for name in sorted(needed - tensors.keys())]
    problems += [f"{name} is empty (a ZeRO stage 3 partition? gather it first)" for name, t in tensors.items() if t.numel() == 0]
    problems += [f"{head}.* is missing" for head in info.head_modules if not any(is_inside(name, [head]) for name in tensors)]
    if problems:
        raise CheckpointError(f"refusing to write {folder}: " + "; ".join(problems))
    with quiet_peft():
        weights = attached.adapter_state(tensors)
    weights |= {name: tensor for name, tensor in tensors.items() if is_inside(name, info.head_modules)}
    config: Any = attached.config
    config.base_model_name_or_path, config.task_type, config.inference_mode = base_model, saved_task_type(auto_class), True
    config.modules_to_save = [head.removeprefix(NAME_PREFIX) for head in info.head_modules] or None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory.
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
    with publish(folder / WEIGHTS_FILE) as partial:
        partial.write_bytes(safetensors.torch.save(whole, metadata={"format": "pt"}))
    content = {
        "base_model": base_model,
        "auto_class": auto_class,
        "model_options": dict(model_options),
        # What the adapter brings itself, so that its values in the backbone do not matter.
        "replaced": [name.removeprefix(NAME_PREFIX).replace(".base_layer", "") for name in (*info.head_modules, *info.tuned_parameters)],
        "backbone": None if backbone is None else backbone.to_dict(),
    }
    run_folder.write_json(folder / run_folder.BACKBONE_FILE, content)
    # The configuration comes last: it is what a reader looks for first. PEFT names the file itself and writes it in place.
    with tempfile.TemporaryDirectory() as written, publish(folder / CONFIG_FILE) as partial:
        config.save_pretrained(written)
        partial.write_bytes((Path(written) / CONFIG_FILE).read_bytes())


def read_backbone(folder: str | Path) -> dict[str, Any]:
    """The content of backbone.json of a folder that `save` wrote: base_model, auto_class, model_options, replaced (names), backbone (its
    fingerprint or None). CheckpointError where it holds none.
    """
    path = Path(folder) / run_folder.BACKBONE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {path.name}: this trainer did not write it; load it with peft.PeftModel.from_pretrained")
    try:
        content = read_json(path)
        options = dict(content["model_options"])
        if "id2label" in options:
            # JSON has no integer keys.
            options["id2label"] = {int(label): name for label, name in options["id2label"].items()}
        saved = content.get("backbone")
        return {
            "base_model": str(content["base_model"]),
            "auto_class": str(content["auto_class"]),
            "model_options": options,
            "replaced": [str(name) for name in content["replaced"]],
            "backbone": None if saved is None else BackboneFingerprint.from_dict(saved),
        }
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged: {reason}; restore it from where it came from") from error


def check_backbone(
    model: PreTrainedModel, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, allow_other_backbone: bool = False
) -> None:
    """See `adakron.adapter_io.check_backbone`."""
    saved = read_backbone(folder)
    if saved["backbone"] is not None:
        found = backbone_differences(saved["backbone"], model, tokenizer, loaded_over=saved["replaced"])
        report_differences(found, model, folder, saved["base_model"], allow_other_backbone=allow_other_backbone)


def _read_settings(path: Path) -> dict[str, Any]:
    """What PEFT's own configuration says. CheckpointError where it is no such file, or would import a module that it names."""
    try:
        content = read_json(path)
    except (OSError, UnreadableError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; restore it from where it came from") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    named = [key for key in ("megatron_config", "auto_mapping") if content.get(key) is not None]
    if named:
        raise CheckpointError(
            f"{path} sets {' and '.join(named)}, which lead PEFT to import modules by name; this trainer writes null there"
        )
    return content


def _check_expressions(settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """ConfigError where PEFT would match the modules' names with an expression that does not end."""
    for setting in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(settings.get(setting), str):
            matched(setting, settings[setting], names)
    # As PEFT puts them into expressions of its own: the keys of *_pattern, and every one of these lists.
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in settings.get(setting) or ():
            matched(setting, rf"(.*\.)?({key})", names)
    for setting, expression in (("layers_pattern", r"(?:^|.*?\.){}\.\d+\..*"), ("modules_to_save", r"(^|.*\.){}($|\..*)")):
        value = settings.get(setting) or ()
        for part in [value] if isinstance(value, str) else value:
            matched(setting, expression.replace("{}", str(part)), names)


@torch.no_grad()
def load(model: PreTrainedModel, folder: str | Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A freshly loaded backbone with a saved adapter and head, frozen and in evaluation mode.

    dtype: of the run that will use it, see `methods.attach`; parameters keep theirs.
    Raises CheckpointError where PEFT cannot read the folder, or where tensors are missing or left over, which PEFT lets pass.
    """
    backbone = {id(tensor) for _, tensor in named_tensors(model)}
    settings = _read_settings(Path(folder) / CONFIG_FILE)
    stored = set(read_tensor_file(Path(folder) / WEIGHTS_FILE, integers=True))
    try:
        with quiet_peft():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # found below, with those left over
            _check_expressions(settings, [name for name, _ in model.named_modules()])
            loaded = PeftModel.from_pretrained(model, str(folder))
            expected = set(get_peft_model_state_dict(loaded, adapter_name=ADAPTER_NAME, save_embedding_layers=False))
            # Where LoRA trains all biases, PEFT lists those of both copies of the head, too.
            copies = [name for name, module in loaded.named_modules() if isinstance(module, ModulesToSaveWrapper)]
            expected = {name for name in expected if not is_inside(name, [f"{copy}.{part}" for copy in copies for part in _COPIES])}
    # PEFT believes its own files: what a tampered one leads to has no common base.
    except Exception as error:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error
    # A method whose settings cannot name whole modules has its head loaded in place.
    known = expected | loaded.state_dict().keys()
    problems = [f"missing {name}" for name in sorted(expected - stored)] + [f"unexpected {name}" for name in sorted(stored - known)]
    if problems:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: " + "; ".join(problems))
    cast_buffers(loaded, backbone, dtype)
    return loaded.eval().requires_grad_(False)
