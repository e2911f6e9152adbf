"""AdaKron's settings as PEFT keeps them: the content of our adapter_config.json, field by field."""

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import transformers
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from adakron.adapter_folder import FORMAT_VERSION
from adakron.adapter_io import TASK_TYPES
from adakron.backbone import head_modules
from adakron.config import AdapterConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import BackboneFingerprint, backbone_differences, take_fingerprint
from adakron.models import sites_of
from adakron.nn import AdaptedLayer, layer_width
from adakron.peft.registration import type_of_method
from adakron.placement import some_of

# PEFT adds these to every sequence classifier, whether the model has them or not.
_ADDED_BY_PEFT = ("classifier", "score")


@dataclass
class AdaKronConfig(PeftConfig):
    """What `get_peft_model` needs to put AdaKron adapters, or one of their relatives, into a model.

    target_modules: as everywhere in PEFT, a regular expression of whole module names or a list of their endings; default: the
    architecture's layers (`adakron.placement`). modules_to_save: modules that train whole; default: the task head.
    seed: of the initial values, which are then those of `adakron.models.adapt`; default: drawn from PyTorch's global generator.
    auto_class, model_options: what builds the head again; taken from the model where they are not given. backbone: the
    fingerprint of what the adapter was trained on; taken from the model where a new adapter has none.
    The settings from `method` on mean what they mean in `adakron.config.AdapterConfig`, and what is None is the method's own.
    Raises ConfigError on settings that AdapterConfig refuses, and on methods without adapters: PEFT has no place for them.
    """

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    seed: int | None = None
    method: str = AdapterConfig.method
    method_config: str | None = None
    bottleneck_dim: int = AdapterConfig.bottleneck_dim
    kron_factor: int = AdapterConfig.kron_factor
    factor_order: Literal["a_major", "b_major"] = AdapterConfig.factor_order
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] | None = None
    num_experts: int | None = None
    experts_in: str | None = None
    expert_scores: Literal["zeros", "random"] = AdapterConfig.expert_scores
    tune_expert_scores: bool = AdapterConfig.tune_expert_scores
    inference_level: Literal[0, 1, 3] = AdapterConfig.inference_level
    adapter_init: Literal["normal", "identity"] = AdapterConfig.adapter_init
    init_std: float = AdapterConfig.init_std
    head_modules: str | None = None
    position: Literal["ffn", "attention", "both"] | None = None
    exclude_modules: str | None = None
    layers: str | None = None
    target_pattern: str | None = None
    tuned_parameters: list[str] = field(default_factory=list)
    auto_class: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    backbone: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    # Whether `backbone` is that of the model that got these settings last. No field: PEFT saves those.
    _is_taken = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = type_of_method()
        if self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {self.format_version}, this release reads 1 to {FORMAT_VERSION}; use the release that wrote the adapter"
            )
        # What is written from here on has every field of the newest version.
        self.format_version = FORMAT_VERSION
        adapter = self.adapter
        for name, value in adapter.to_dict().items():
            if name != "target_modules":
                setattr(self, name, value)
        if not adapter.has_adapters or self.tuned_parameters or self.target_modules == []:
            raise ConfigError(
                f"method {self.method} trains parameters of the model itself and puts no adapters into it, which PEFT cannot do; load it"
                " with adakron.load_adapter, or choose a method with adapters"
            )

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter's settings as the rest of the package has them, resolved."""
        names = [setting.name for setting in fields(AdapterConfig) if setting.name != "target_modules"]
        return AdapterConfig(**{name: getattr(self, name) for name in names}, target_modules=self.target_pattern).resolved()

    def complete(self, model: nn.Module, matches: Any) -> None:
        """Replace what was left open, or said by endings of names, by the modules of the model that are meant.

        matches: tells whether a module of that name is a target, as PEFT decides it.
        Raises ConfigError on names that the model does not have and targets that are not linear layers.
        """
        if any(isinstance(module, AdaptedLayer) for module in model.modules()):
            raise ConfigError(f"this {type(model).__name__} has adapters that PEFT did not make; load the backbone anew")
        wrappers = [f"{name}." for name, module in model.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        names = [name for name, _ in model.named_modules() if name and not name.startswith(tuple(wrappers))]
        if isinstance(model, PreTrainedModel):
            self._take_or_compare(model)
        if self.modules_to_save is None and self.head_modules:
            self.modules_to_save = [name.strip() for name in self.head_modules.split(",")]
        if self.modules_to_save is not None:
            absent = [end for end in self.modules_to_save if end not in _ADDED_BY_PEFT and not any(name.endswith(end) for name in names)]
            if absent:
                raise ConfigError(f"modules_to_save names {', '.join(absent)}, which {type(model).__name__} does not have")
            # The way PEFT itself finds them.
            self.modules_to_save = [name for name in names if any(name.endswith(end) for end in self.modules_to_save)]
        elif isinstance(model, PreTrainedModel):
            self.modules_to_save = list(head_modules(model))
        self._complete_targets(model, names, matches)
        if self.auto_class is None and isinstance(model, PreTrainedModel):
            self.auto_class = _auto_class(model, self.task_type)
        if not self.model_options and self.auto_class in ("AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
            self.model_options = _label_options(model)

    def _take_or_compare(self, model: PreTrainedModel) -> None:
        """The fingerprint: of a new adapter taken from this model, of a saved one compared; ConfigError where it is another backbone's.

        It stays None for an adapter that was saved without one, and where the model's values are not at hand.
        """
        if self.backbone is None or self._is_taken:
            # In inference mode, this may be any model; what the adapter was trained on is not known.
            if not self.inference_mode:
                self.backbone, self._is_taken = _fingerprint(model), True
            return
        found = backbone_differences(BackboneFingerprint.from_dict(self.backbone), model, loaded_over=self.modules_to_save or ())
        if found:
            raise ConfigError(
                f"the adapter was trained on another backbone ({self.base_model_name_or_path}) than this {type(model).__name__}:"
                f" {'; '.join(found)} (load its own backbone, or set backbone to null in adapter_config.json)"
            )

    def _complete_targets(self, model: nn.Module, names: list[str], matches: Any) -> None:
        expected: list[str] | None = None
        if isinstance(model, PreTrainedModel):
            try:
                expected = sites_of(model, self.adapter)
            except ConfigError:
                if self.target_modules is None:
                    raise
        if self.target_modules is None:
            if expected is None:
                raise ConfigError(f"{type(model).__name__} is no model of transformers; name the layers to adapt in target_modules")
            self.target_modules = expected
            return
        if not isinstance(self.target_modules, str):
            absent = [end for end in self.target_modules if not any(name == end or name.endswith(f".{end}") for name in names)]
            if absent:
                raise ConfigError(f"target_modules names {some_of(absent)}, which {type(model).__name__} does not have")
        sites = [name for name in names if matches(self, name)]
        if not sites:
            raise ConfigError(f"target_modules {self.target_modules!r} matches no module of {type(model).__name__}")
        for site in sites:
            layer_width(model.get_submodule(site))
        if sites != expected:
            # So that our own loader, which finds the layers by these settings, finds the same ones.
            self.target_pattern = "|".join(map(re.escape, sites))
            self.position = self.exclude_modules = self.layers = None
        self.target_modules = sites


def _fingerprint(model: PreTrainedModel) -> dict[str, Any] | None:
    try:
        return take_fingerprint(model).to_dict()
    except CheckpointError:
        # On the meta device: training is possible all the same.
        return None


def _auto_class(model: PreTrainedModel, task_type: str | None) -> str | None:
    """The Auto class that builds such a model; None where none of those that PEFT knows does."""
    by_task = [name for name, task in TASK_TYPES.items() if task == task_type]
    for name in by_task or TASK_TYPES:
        built = getattr(transformers, name)._model_mapping.get(type(model.config), ())
        if type(model) in (built if isinstance(built, tuple) else (built,)):
            return name
    return by_task[0] if by_task else None


def _label_options(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    options = {"num_labels": config.num_labels, "id2label": dict(config.id2label), "label2id": dict(config.label2id)}
    if config.problem_type == "regression":
        options = {"num_labels": config.num_labels}
    return options | ({"problem_type": config.problem_type} if config.problem_type else {})
