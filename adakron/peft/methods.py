"""PEFT's own methods in our trainer: attaching one to a backbone.

What trains is found by comparing tensors before and after, never by name, so that no method needs code of its own. The head
trains as it does with our methods: in place, with the values that it has.
"""

import json
import random
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adakron.backbone import NewParameters, is_inside
from adakron.config import AdapterConfig
from adakron.errors import ConfigError
from adakron.models import frozen_at_random, head_to_train
from adakron.peft.method_settings import TAKE_CONV1D, VECTORS, available, method_config
from adakron.placement import some_of
from adakron.trainable import AdaptedModelInfo

ADAPTER_NAME = "default"
NAME_PREFIX = "base_model.model."
"""Of the backbone's names inside a PeftModel."""


@dataclass(frozen=True)
class Attached:
    """A backbone with a method of PEFT's.

    model: what trains, as PEFT wraps it. info: by names in `model`.
    vectors: trained parameters that are vectors in spite of their number of dimensions; they get no weight decay.
    kept: what the adapter holds and does not train, such as VeRA's projections, on the CPU; by name in the state dict.
    names: state dict name of every tensor of the adapter that trains -> its parameter's name (shared ones have several).
    """

    model: PeftModel
    info: AdaptedModelInfo
    vectors: tuple[str, ...]
    kept: Mapping[str, Tensor]
    names: Mapping[str, str]

    @property
    def config(self) -> PeftConfig:
        """PEFT's settings of the adapter."""
        return self.model.peft_config[ADAPTER_NAME]

    def adapter_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What PEFT saves of the adapter, under its names on disk. tensors: what trained, whole, by parameter name."""
        state = dict(self.kept) | {key: tensors[name] for key, name in self.names.items()}
        return dict(get_peft_model_state_dict(self.model, state, ADAPTER_NAME, save_embedding_layers=False))


def attach(
    model: PreTrainedModel,
    config: AdapterConfig,
    *,
    seed: int,
    new_parameters: NewParameters = NewParameters(),  # noqa: B008, an immutable value
    dtype: torch.dtype = torch.float32,
) -> Attached:
    """Put the adapters of a method of PEFT's into a backbone and let them and the head train; see `adakron.models.adapt`.

    seed: of the adapters' initial values, which are the same on every rank and leave the global random state alone.
    dtype: of the run; what the adapters hold besides parameters gets it here, for DeepSpeed casts parameters only.
    Raises ConfigError on settings that PEFT refuses, a head that would stay random, and methods that would not load again.
    """
    peft_config: Any = method_config(config)
    heads = head_to_train(model, config, new_parameters)
    problems = frozen_at_random(model, new_parameters, heads)
    if problems:
        raise ConfigError(problems)
    # Names, places and versions of all tensors: an initialisation that writes to them shows in the last two.
    before = {id(tensor): (name, tensor.data_ptr(), tensor._version) for name, tensor in named_tensors(model)}
    # Layers of the head are no targets; PEFT leaves out what it is told to train whole.
    peft_config.modules_to_save = list(heads) or None
    try:
        with quiet_peft(), _seeded(seed):
            wrapped = get_peft_model(model, peft_config, ADAPTER_NAME)
    except Exception as error:
        raise ConfigError(_refusal(model, config, error)) from error
    _unwrap_heads(wrapped)
    after = {id(tensor): (tensor.data_ptr(), tensor._version) for _, tensor in named_tensors(model)}
    changed = [name for key, (name, *state) in before.items() if after.get(key) != tuple(state)]
    if changed:
        raise ConfigError(
            f"method {config.method} with these settings changes the backbone itself ({some_of(changed, 2)}), so the saved adapter would"
            " not fit the original; choose another start of the adapters in --method_config"
        )
    attached = _describe(wrapped, heads, before.keys(), config.method)
    _check_saved(attached, config.method)
    cast_buffers(wrapped, before.keys(), dtype)
    return attached


def cast_buffers(model: nn.Module, backbone: Collection[int], dtype: torch.dtype) -> None:
    """Give the floating buffers of the adapters a dtype: PEFT multiplies them with parameters. backbone: identities of all others."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in backbone and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers."""
    return [*model.named_parameters(), *model.named_buffers()]


def _describe(model: PeftModel, heads: Sequence[str], backbone: Collection[int], method: str) -> Attached:
    """Let the head train, and sort what there is by what trains. backbone: identities of the tensors that were there before."""
    modules = tuple(NAME_PREFIX + head for head in heads)
    for module in modules:
        model.get_submodule(module).requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_inside(name, modules)}
    adapter = {name: p for name, p in trained.items() if id(p) not in backbone}
    first_names = {id(p): name for name, p in trained.items()}
    state = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    tuner: Any = model.base_model
    info = AdaptedModelInfo(
        sites=tuple(tuner.targeted_module_names),
        head_modules=modules,
        adapter_parameters=tuple(adapter),
        tuned_parameters=tuple(name for name in trained if name not in adapter),
    )
    return Attached(
        model,
        info,
        # Not by shape: a matrix of rank 1 is one still, and a comparison of ranks is not one of regularisation.
        vectors=tuple(name for name in adapter if not {*name.split(".")}.isdisjoint(VECTORS.get(method, ()))),
        kept={key: t.detach().to("cpu", copy=True) for key, t in state.items() if id(t) not in first_names and id(t) not in backbone},
        names={key: first_names[id(t)] for key, t in state.items() if id(t) in first_names},
    )


def _unwrap_heads(model: PeftModel) -> None:
    # The original modules train: their values are those of every other method, and no second copy is counted or kept.
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.original_module)


def _check_saved(attached: Attached, method: str) -> None:
    """ConfigError where PEFT would not save something that trains, before anything is trained."""
    parameters = {name: attached.model.get_parameter(name) for name in {*attached.names.values()}}
    with quiet_peft():
        saved = {id(tensor) for tensor in attached.adapter_state(parameters).values()}
    lost = [name for name, parameter in parameters.items() if id(parameter) not in saved]
    if lost:
        raise ConfigError(
            f"method {method} with these settings trains {some_of(lost, 2)}, which PEFT {peft.__version__} does not save as it is; choose"
            " other settings in --method_config"
        )


def _refusal(model: PreTrainedModel, config: AdapterConfig, error: Exception) -> str:
    """What PEFT's error means for the user: it names types of layers, settings and Python attributes."""
    unknown_model = "specify `target_modules`" in str(error)
    wanted = "norm" if config.method == "ln_tuning" else "linear"
    endings = _endings(model, config, wanted)
    has_conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    if has_conv1d and config.method not in TAKE_CONV1D and ("Conv1D" in str(error) or (unknown_model and not endings)):
        return (
            f"method {config.method} of PEFT adapts no Conv1D layers, which this {type(model).__name__} has in place of linear ones; choose"
            f" one that does ({', '.join(sorted(TAKE_CONV1D & {*available()}))}; set --method), or name other layers in --method_config"
        )
    if unknown_model:
        return (
            f"PEFT knows no layers for method {config.method} in a {type(model).__name__}; name some in --method_config, such as"
            f' {{"target_modules": {json.dumps(endings[:1])}}}; its {wanted} layers are called {some_of(endings, 20)}'
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"PEFT refuses method {config.method} for this {type(model).__name__}: {reason} (set --method_config)"


def _endings(model: PreTrainedModel, config: AdapterConfig, wanted: str) -> list[str]:
    """How the layers outside the head are called that the method can adapt. wanted: part of their type's name."""
    heads = head_to_train(model, config, NewParameters())
    kinds = (wanted, "conv1d") if config.method in TAKE_CONV1D else (wanted,)
    found = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(kind in type(module).__name__.lower() for kind in kinds) and not is_inside(name, heads)
    ]
    return list(dict.fromkeys(found))


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings of PEFT that say nothing about the run, each by name."""
    with warnings.catch_warnings():
        # PEFT up to 0.21.2 reads a property that transformers 5 renamed, whenever it wraps a model.
        warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing` is deprecated")
        # BOFT without its CUDA kernel computes the same more slowly.
        warnings.filterwarnings("ignore", category=UserWarning, message="Failed to load the CUDA extension|Setting boft_n_butterfly_factor")
        # PEFT sees by itself that a layer is a Conv1D, which holds its weight transposed, and says so.
        warnings.filterwarnings("ignore", category=UserWarning, message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        # LN tuning adapts norm layers, and warns that they are no linear ones.
        warnings.filterwarnings("ignore", category=UserWarning, message="Unsupported layer type .*Norm")
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every generator that a method may draw its initial values from, and afterwards where it was."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would reseed the accelerators as well, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
