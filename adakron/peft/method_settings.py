"""The settings of PEFT's methods: which methods there are, and what `--method_config` may say. No model is looked at here."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from adakron.adapter_folder import PEFT_TYPE
from adakron.config import AdapterConfig
from adakron.errors import ConfigError

_PROMPT = "puts its own tokens before the input, which changes lengths, positions and pooled outputs"
REFUSED = {
    "prefix_tuning": _PROMPT,
    "prompt_tuning": _PROMPT,
    "p_tuning": _PROMPT,
    "multitask_prompt_tuning": _PROMPT,
    "cpt": _PROMPT,
    "cartridge": _PROMPT,
    "adaption_prompt": "knows only a few decoders, and keeps its tensors outside the layers",
    "adalora": "moves rank between layers after every step from gradients that ZeRO has already reduced and freed",
    "poly": "needs to be told each example's task",
    "xlora": "mixes adapters that were trained before",
    "osf": "trains the backbone's own weights, which its adapter file does not hold",
    "lily": "mixes its experts by an average over the whole batch, so that a text's result depends on its neighbours",
    "shadow": "adds a loss of its own, and knows decoders only",
}
"""PEFT's methods that would not work as they should in our trainer, with the reason."""

NOT_AT_STAGE_3 = {"deft": "reads the shapes of weights that ZeRO-3 has partitioned"}
ONLY_IN_FP32 = {"adamss": "multiplies tensors of its own, in float32, with the layer's input"}
"""Methods that train under some of the shipped JSONs only, with the reason."""

VECTORS = {
    "beft": ("beft_bias",),
    "boft": ("boft_s",),
    "dora": ("lora_magnitude_vector",),
    "glora": ("X",),
    "ia3": ("ia3_l",),
    "lora": ("lora_magnitude_vector",),
    # One vector for each basis.
    "randlora": ("randlora_lambda", "randlora_gamma"),
}
"""Tensors of a method that scale or shift features, so are vectors, though PEFT gives them further dimensions."""

TAKE_CONV1D = frozenset(
    ("deft", "dora", "fourierft", "frod", "gralora", "hira", "ia3", "lora", "pvera", "randlora", "tinylora", "unilora", "vblora", "vera",
     "waveft")
)  # fmt: skip
"""Methods that adapt Conv1D of transformers, the transposed linear layer of GPT-2, as well as Linear; PEFT does not say which do."""

_REFUSED_SETTINGS = {
    "use_asa": "masks subspaces during training, by calls that this trainer does not make",
    "alora_invocation_tokens": "looks for tokens in the input before each pass",
    "monteclora_config": "adds a term to the loss",
    "arrow_config": "routes between adapters that were trained before",
    "layer_replication": "repeats layers of the backbone",
    "eva_config": "needs data before the first step",
    "corda_config": "needs data before the first step",
    "lora_ga_config": "needs data before the first step",
}
_NEEDED = {"trainable_tokens": "token_indices"}
"""Settings without which a method trains nothing, or fails in its first forward pass."""

DRAWS_NOISE = ("pvera",)
"""Methods whose forward pass in training draws numbers besides dropout's."""

_LORA_STARTS = (True, False, "gaussian", "orthogonal")

# Said by the trainer and by other flags.
_OURS = {field.name for field in dataclasses.fields(PeftConfig)} | {"modules_to_save", "runtime_config"}


def available() -> list[str]:
    """The methods that this release trains with the installed PEFT, by the names that --method takes."""
    names = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {PEFT_TYPE.lower(), *REFUSED}
    return sorted(names | {"dora"})


def check_run(config: AdapterConfig, stage: int, precision: str) -> None:
    """ConfigError where the method cannot train at that ZeRO stage, or in that precision (fp32, bf16, fp16)."""
    problems = []
    if stage == 3 and config.method in NOT_AT_STAGE_3:
        problems.append(f"at ZeRO-3: it {NOT_AT_STAGE_3[config.method]}; choose --deepspeed ds_configs/zero2.json")
    if precision != "fp32" and config.method in ONLY_IN_FP32:
        problems.append(f"in {precision}: it {ONLY_IN_FP32[config.method]}; choose --deepspeed ds_configs/zero2_fp32.json")
    if problems:
        raise ConfigError([f"method {config.method} of PEFT does not train {problem}, or another --method" for problem in problems])


def method_config(config: AdapterConfig) -> PeftConfig:
    """PEFT's configuration for a method and its --method_config; looks at no model. Raises ConfigError naming all that is wrong."""
    if config.method in REFUSED:
        raise ConfigError(f"method {config.method} of PEFT cannot be trained here: it {REFUSED[config.method]}; choose another --method")
    if config.method not in available():
        near = difflib.get_close_matches(config.method, available(), n=1)
        raise ConfigError(
            f"PEFT has no method {config.method!r}; {f'did you mean {near[0]}? It' if near else 'it'} has {', '.join(available())}"
            " (set --method)"
        )
    settings = _settings(config)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[("lora" if config.method == "dora" else config.method).upper()]]
    problems = _setting_problems(config.method, kind, settings)
    if problems:
        raise ConfigError(problems)
    if config.method == "dora":
        settings["use_dora"] = True
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method_config does not suit {config.method}: {error} (set --method_config)") from error


def _settings(config: AdapterConfig) -> dict[str, Any]:
    if config.method_config is None:
        return {}
    try:
        settings = json.loads(config.method_config)
    except ValueError as error:
        raise ConfigError(f"method_config is not a JSON object: {error} (set --method_config)") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"method_config is {config.method_config}; it must be a JSON object (set --method_config)")
    return settings


def _setting_problems(method: str, kind: type[PeftConfig], settings: Mapping[str, Any]) -> list[str]:
    known = {field.name for field in dataclasses.fields(kind)} - _OURS - _REFUSED_SETTINGS.keys()
    problems = [
        f"method_config sets {name} for {method}, which {_REFUSED_SETTINGS[name]}; this trainer cannot, so drop it"
        for name in settings
        if name in _REFUSED_SETTINGS and settings[name]
    ]
    unknown = [name for name in settings if name not in known | _REFUSED_SETTINGS.keys()]
    if "modules_to_save" in unknown:
        problems.append("method_config sets modules_to_save; name the modules that train whole with --head_modules")
        unknown.remove("modules_to_save")
    if unknown:
        problems.append(f"method_config has {', '.join(unknown)}; the settings of {method} are {', '.join(sorted(known))}")
    try:
        hints = get_type_hints(kind)
    except NameError:
        # PEFT names a class there that it imports for type checkers only; then its own checks must do.
        hints = {}
    problems += [
        f"method_config: {name} is {value!r}; PEFT takes {str(hints[name]).replace('typing.', '')}"
        for name, value in settings.items()
        if name in known and name in hints and not _fits(value, hints[name])
    ]
    if method in _NEEDED and not settings.get(_NEEDED[method]):
        problems.append(f"method {method} needs {_NEEDED[method]}; give it in --method_config")
    if method == "dora" and settings.get("use_dora") is False:
        problems.append("method_config sets use_dora to false, and method dora is lora with it; use --method lora")
    start = settings.get("init_lora_weights", True)
    if method in ("lora", "dora") and start not in _LORA_STARTS:
        problems.append(
            f"method_config: init_lora_weights is {start!r}, which changes the backbone or needs data first; this trainer takes"
            f" {', '.join(map(str, _LORA_STARTS))}"
        )
    return problems


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type, as far as the type says anything about JSON."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    kind = origin or hint
    if kind in (bool, int, str, type(None)):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    if kind in (list, tuple, set, Sequence):
        return isinstance(value, list)
    return isinstance(value, dict) if kind is dict else True
