"""ZeRO stage 3 from loading on: a backbone that no rank ever holds whole.

Transformers builds a model under `deepspeed.zero.Init` and reads its checkpoint parameter by parameter while an
`HfDeepSpeedConfig` is alive. Every value is the same, bit for bit, as in a model that is loaded whole and partitioned later.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers.modeling_utils
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from adakron.engine.ds_config import DeepSpeedSettings
from adakron.engine.upstream import quiet_initialisation, ready_deepspeed
from adakron.weights import is_partitioned, shape


@contextmanager
def partitioned_loading(settings: DeepSpeedSettings, device: torch.device) -> Iterator[None]:
    """Inside, transformers' `from_pretrained` loads partitioned models: each parameter is cut up as soon as it is read.

    Needs the process group. All ranks load the same model; rank 0 alone reads values.
    """
    ready_deepspeed(device)
    # The name must stay bound: transformers keeps a weak reference, and without the object it loads whole models.
    alive = HfDeepSpeedConfig(_loading_config(settings))
    with _misshapen_left_out(), quiet_initialisation():
        yield
    del alive


def _loading_config(settings: DeepSpeedSettings) -> dict[str, Any]:
    config = copy.deepcopy(settings.config)
    if config["zero_optimization"].get("offload_param", {}).get("device") != "nvme":
        # In fp32, and cast later: what the checkpoint lacks is drawn by transformers, and 16-bit draws are other numbers than
        # fp32 draws that are rounded. Partitions on NVMe are out of reach once written, so there the draws differ.
        config["bf16"] = config["fp16"] = {"enabled": False}
        config.pop("data_types", None)
        config.pop("communication_data_type", None)
    return config


@contextmanager
def _misshapen_left_out() -> Iterator[None]:
    """Transformers 5.23 forgets `ignore_mismatched_sizes` at stage 3: a head of another size is an error, on rank 0 alone.

    Tensors that do not fit are left out of what is read, so that they count as missing and are drawn anew.
    """
    original = transformers.modeling_utils._load_state_dict_into_zero3_model

    def load(model: Any, state_dict: Mapping[str, Tensor], load_config: Any = None) -> Any:
        shapes = {name: shape(parameter) for name, parameter in model.named_parameters()}
        prefix = f"{model.base_model_prefix}."

        def fits(key: str, tensor: Tensor) -> bool:
            # Checkpoints name the base model's tensors with or without its prefix.
            own = next((shapes[name] for name in (key, prefix + key, key.removeprefix(prefix)) if name in shapes), None)
            return own is None or own == tuple(tensor.shape)

        return original(model, {key: tensor for key, tensor in state_dict.items() if fits(key, tensor)}, load_config)

    transformers.modeling_utils._load_state_dict_into_zero3_model = load
    try:
        yield
    finally:
        transformers.modeling_utils._load_state_dict_into_zero3_model = original


@torch.no_grad()
def ready_for_stage_3(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """What `deepspeed.initialize` leaves out where a model was loaded partitioned: precision, and buffers on the device."""
    cast_partitioned(model, dtype)
    for buffer in model.buffers():  # DeepSpeed moves those of whole models only
        buffer.data = buffer.data.to(device)


def cast_partitioned(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model that was loaded partitioned the run's precision; a whole one is left alone.

    `deepspeed.initialize` casts whole models only. It fails on partitioned ones with parameters of two precisions, as a 16-bit
    run would have with its backbone and its freshly made adapters.
    """
    if not any(map(is_partitioned, model.parameters())):
        return
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
            if is_partitioned(parameter):
                part = parameter.ds_tensor  # type: ignore[attr-defined]  # this rank's share
                pinned = part.is_pinned()
                part.data = part.data.to(dtype).pin_memory() if pinned else part.data.to(dtype)
