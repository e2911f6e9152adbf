import dataclasses

import pytest
import torch

from adakron import quantization
from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.errors import ConfigError
from adakron.launcher import World
from launch.attachment import partitioning
from launch.checks import resolve_deepspeed
from tests.helpers.launch import ROOT


def config(json_name: str, quantization: str | None = None, method: str = "adakron") -> RunConfig:
    return RunConfig(
        model=ModelConfig(quantization=quantization), adapter=AdapterConfig(method=method), data=DataConfig(), training=TrainingConfig(),
        deepspeed=str(ROOT / "ds_configs" / f"{json_name}.json"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("json_name", "kind", "device", "said"),
    [
        ("zero3_fp32", "8bit", "cpu", "8bit does not go with ZeRO-3.*zero2.json, or drop --quantization"),
        ("zero3_fp32", "4bit", "cuda", "4bit does not go with ZeRO-3"),
        ("zero2_fp32", "4bit", "cpu", "4bit is not for training on a CPU.*--quantization 8bit"),
        ("zero2_fp32", "8bit", "cpu", None),
        ("zero2_fp32", "4bit", "cuda", None),
    ],
)
def test_quantisation_and_the_run(monkeypatch, json_name, kind, device, said):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    if said is None:
        assert resolve_deepspeed(config(json_name, kind), World(), torch.device(device)).precision == "fp32"
        return
    with pytest.raises(ConfigError, match=said):
        resolve_deepspeed(config(json_name, kind), World(), torch.device(device))


@pytest.mark.parametrize(
    ("json_name", "method", "expected"), [("zero3_fp32", "adakron", True), ("zero3_fp32", "lora", False), ("zero2_fp32", "adakron", False)]
)
def test_our_methods_are_loaded_in_parts_at_stage_3(json_name, method, expected):
    run = config(json_name, method=method)
    settings = resolve_deepspeed(run, World(), torch.device("cpu"))
    assert (partitioning(run, settings, World(), torch.device("cpu")) is not None) is expected


def test_nvme_is_refused_before_the_run():
    with pytest.raises(ConfigError, match=r"zero3_nvme.json: \"zero_optimization.offload_param.nvme_path\" is '/local_nvme'"):
        resolve_deepspeed(config("zero3_nvme"), World(), torch.device("cpu"))


def test_a_step_of_given_size_is_dealt_out_to_any_number_of_ranks():
    given = config("zero2_fp32")
    given = dataclasses.replace(given, training=TrainingConfig(global_batch_size=10, per_device_train_batch_size=2))
    for ranks, accumulation in ((1, 5), (2, 3), (3, 2), (10, 1)):
        settings = resolve_deepspeed(given, World(world_size=ranks, local_world_size=ranks), torch.device("cpu"))
        assert settings.config["gradient_accumulation_steps"] == accumulation
    with pytest.raises(ConfigError, match="global_batch_size is 10 and there are 11 processes; each needs an example per step"):
        resolve_deepspeed(given, World(world_size=11, local_world_size=11), torch.device("cpu"))


@pytest.mark.parametrize("name", ["global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"])
def test_a_batch_beyond_what_deepspeed_can_print_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} has 401 digits; it must be at most 1,000,000,000"):
        TrainingConfig(**{name: 10**400})
    given = dataclasses.replace(config("zero2_fp32"), training=TrainingConfig(**{name: 10**9}))
    assert resolve_deepspeed(given, World(), torch.device("cpu")).config["train_batch_size"] >= 10**9
