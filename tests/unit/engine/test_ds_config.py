import dataclasses
import json
import re
from pathlib import Path

import pytest

from adakron.engine.ds_config import RunValues, device_problem, offload_problem, parser_problem, read_json, resolve
from adakron.errors import ConfigError

SHIPPED = sorted((Path(__file__).resolve().parents[3] / "ds_configs").glob("*.json"))
VALUES = RunValues(micro_batch=8, accumulation=2, world_size=4, max_grad_norm=0.5)


PRECISIONS = ("fp32", "bf16", "fp16")
BY_FLAG = ("zero2_offload", "zero3_offload", "zero3_nvme")
"""Files whose precision the flags decide."""


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_json_resolves(file):
    settings = resolve(read_json(str(file)), VALUES)
    assert "auto" not in json.dumps(settings.config)
    assert file.stem.startswith(f"zero{settings.stage}")
    expected = "fp32" if file.stem in BY_FLAG or "fp32" in file.stem else "fp16" if "fp16" in file.stem else "bf16"
    assert settings.precision == expected


def test_every_stage_is_shipped_in_every_precision_that_it_trains_in():
    found = {(settings.stage, settings.precision) for settings in (resolve(read_json(str(file)), VALUES) for file in SHIPPED)}
    assert found == {(0, "fp32")} | {(stage, precision) for stage in (1, 2, 3) for precision in PRECISIONS}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_shipped_json_works_in_every_precision(file, precision):
    source = read_json(str(file))
    for name in ("bf16", "fp16"):
        source[name] = source[name] | {"enabled": name == precision}
    if source["zero_optimization"]["stage"] == 0 and precision != "fp32":
        with pytest.raises(ConfigError, match=f"{precision} at ZeRO stage 0"):
            resolve(source, VALUES)
        return
    settings = resolve(source, VALUES)
    assert settings.precision == precision and parser_problem(settings.config) is None
    # Never left to DeepSpeed: it clips at 1, and accumulates and reduces bf16 in bf16.
    assert settings.config["gradient_clipping"] == (0.0 if settings.stage == 0 else 0.5)
    if precision == "bf16":
        assert settings.config["data_types"]["grad_accum_dtype"] == settings.config["communication_data_type"] == "fp32"


@pytest.mark.parametrize("name", BY_FLAG)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_flags_choose_the_precision_of_offload(name, precision):
    file = next(file for file in SHIPPED if file.stem == name)
    assert resolve(read_json(str(file)), dataclasses.replace(VALUES, **{precision: True})).precision == precision


def nvme(path):
    return resolve({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(path)}}}, VALUES).config


def test_the_examples_of_a_step_may_be_a_number_of_their_own():
    values = RunValues(micro_batch=8, accumulation=3, world_size=4, max_grad_norm=0.5, examples=70)
    assert resolve({"train_batch_size": 70}, values).config["train_batch_size"] == 96  # DeepSpeed insists on the product
    with pytest.raises(ConfigError, match='"train_batch_size" is 96, but --global_batch_size gives 70'):
        resolve({"train_batch_size": 96}, values)


def test_nvme_needs_a_folder_and_asynchronous_io(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    assert "libaio-dev" in offload_problem(nvme(tmp_path))
    assert "nvme_path" in offload_problem(nvme(tmp_path / "missing"))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    assert offload_problem(nvme(tmp_path)) is None
    assert offload_problem(resolve({"zero_optimization": {"stage": 2}}, VALUES).config) is None


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("fp16", "fp16 is not supported on this cpu device; use bf16 .ds_configs/zero2.json."),
        ("bf16", "bf16 is not supported"),
        ("fp32", None),
    ],
)
def test_a_precision_that_the_device_refuses_is_named(precision, said, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: False)
    problem = device_problem(precision, "cpu")
    assert problem is None if said is None else re.match(said, problem)


def test_batch_geometry_and_silent_defaults_are_written_out():
    config = resolve({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, VALUES).config
    assert config["train_batch_size"] == 64
    assert config["gradient_clipping"] == 0.5
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    assert config["managed_gradient_accumulation"] is False
    assert config["zero_optimization"]["reduce_bucket_size"] <= 5_000_000


def test_no_clipping_is_zero_and_not_deepspeeds_default():
    values = RunValues(micro_batch=8, accumulation=1, world_size=1, max_grad_norm=0.0)
    assert resolve({"zero_optimization": {"stage": 2}}, values).config["gradient_clipping"] == 0.0


def test_flags_turn_on_an_auto_precision():
    values = RunValues(micro_batch=1, accumulation=1, world_size=1, max_grad_norm=1.0, bf16=True)
    assert resolve({"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}}, values).precision == "bf16"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation"),
        ({"optimizer": {"type": "Adam"}}, "--learning_rate"),
        ({"train_micro_batch_size_per_gpu": 4}, "--per_device_train_batch_size gives 8"),
        ({"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps gives 2"),
        ({"train_batch_size": 8}, "gives 64"),
        ({"gradient_clipping": 1.0}, "--max_grad_norm gives 0.5"),
        ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": 2}, "must be an object"),
        ({"bf16": {"enabled": True}}, "stage 0"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "both enabled"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, "reduce_bucket_size"),
        ({"communication_data_type": "bananas"}, "communication_data_type"),
        ({"steps_per_print": 0}, "steps_per_print"),
        ({"checkpoint": {"writer": {"type": "FAST"}}}, "checkpoint.writer"),
    ],
)
def test_what_contradicts_the_run_is_named(source, said):
    with pytest.raises(ConfigError, match=said):
        resolve(source, VALUES, name="my.json")


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        resolve({"gradient_cliping": 1.0, "train_batch_size": 7, "scheduler": {}}, VALUES)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1, "a": 2}', "\xff"])
def test_a_broken_file_is_one_clear_error(tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"bad\.json"):
        read_json(str(file))


@pytest.mark.parametrize(
    "section",
    [
        {"zero_optimization": {"stage": 2, "stag": 1}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
        {"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}},
        {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "foo": 1}},
        {"flops_profiler": 5},
    ],
)
def test_what_deepspeeds_own_parser_refuses_is_found_before_the_run(section):
    assert parser_problem(resolve(section, VALUES).config)


@pytest.mark.parametrize(
    "section", [{"bf16": {"enabled": True, "check_grad_overflow": False}}, {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}]
)
def test_a_gradient_that_is_not_finite_cannot_be_let_through(section):
    with pytest.raises(ConfigError, match="not finite would be applied; remove it"):
        resolve({"zero_optimization": {"stage": 2}} | section, VALUES)
    resolved = resolve({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, VALUES)
    assert resolved.config["bf16"]["check_grad_overflow"] is True


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, r'offload_optimizer\.device" is "nvme": .*; set it to "cpu"$'),
        ({"offload_optimizer": {"device": "disk"}}, r"offload_optimizer\.device\" is 'disk'; it must be one of none, cpu$"),
        ({"offload_param": {"device": "disk"}}, r"offload_param\.device\" is 'disk'; it must be one of none, cpu, nvme$"),
        ({"zenflow": {}}, "zenflow"),
        ({"round_robin_gradients": True}, "round_robin_gradients"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights"),
        ({"allgather_bucket_size": 7}, "allgather_bucket_size"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.3}}, "offload_optimizer.ratio"),
    ],
)
def test_what_keeps_states_from_checkpoints_is_refused(section, named):
    values = RunValues(micro_batch=1, accumulation=1, world_size=1, max_grad_norm=1.0)
    with pytest.raises(ConfigError, match=named):
        resolve({"zero_optimization": {"stage": 3, **section}}, values)
