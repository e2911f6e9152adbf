import json
from pathlib import Path

import pytest

from adakron.engine.ds_config import RunValues, parser_problem, read_json, resolve
from adakron.errors import ConfigError

SHIPPED = sorted((Path(__file__).resolve().parents[3] / "ds_configs").glob("*.json"))
VALUES = RunValues(micro_batch=8, accumulation=2, world_size=4, max_grad_norm=0.5)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_json_resolves(file):
    settings = resolve(read_json(str(file)), VALUES)
    assert "auto" not in json.dumps(settings.config)
    assert file.stem.startswith(f"zero{settings.stage}")
    assert settings.precision == ("fp32" if "fp32" in file.stem else "fp16" if "fp16" in file.stem else "bf16")


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


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_deepspeed_accepts_what_resolve_makes_of_the_shipped_files(file):
    assert parser_problem(resolve(read_json(str(file)), VALUES).config) is None


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
