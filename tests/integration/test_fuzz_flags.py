"""Hostile command lines, recipes and DeepSpeed JSONs: refused in one paragraph, or accepted."""

import json

import pytest

from launch import train
from tests.helpers.fuzzing import Case, cases, generator, run_case
from tests.helpers.hostile import flags, json_files, recipes

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def base(tiny_bert, tiny_data, tmp_path):
    """Flags of a run that would be accepted, and the folder that the run would go to."""
    home = tmp_path / "home"
    home.mkdir()
    return ["--model_name_or_path", str(tiny_bert), "--task_name", "sst2", "--data_dir", str(tiny_data), "--output_dir", str(home / "out")]


@cases(160)
def test_flags(index, base, tmp_path, monkeypatch, offline):
    rng = generator("flags", index)
    arguments, named = flags.hostile(rng, tmp_path)
    run_case(Case(train, [*base, *arguments], named), tmp_path / "home", monkeypatch)


@cases(100)
def test_recipes(index, base, tmp_path, monkeypatch, offline):
    rng = generator("recipes", index)
    file = tmp_path / "recipe.yaml"
    content, what = recipes.hostile(rng)
    file.write_bytes(content)
    run_case(Case(train, [*base, "--config", str(file)], ("recipe.yaml", *recipes.KEYS), what), tmp_path / "home", monkeypatch)


@cases(30)
def test_method_configs(index, base, tmp_path, monkeypatch, offline):
    rng = generator("method_config", index)
    given = recipes.hostile_method_config(rng, tmp_path)
    named = ("method_config", "PEFT", "method", "target_modules")
    run_case(Case(train, [*base, "--method", "lora", "--method_config", given], named), tmp_path / "home", monkeypatch)


@cases(160)
def test_deepspeed_json(index, base, tmp_path, monkeypatch, offline):
    rng = generator("json", index)
    file = tmp_path / "zero.json"
    content, what = json_files.hostile(rng)
    file.write_bytes(content)
    run_case(Case(train, [*base, "--deepspeed", str(file)], ("zero.json",), what), tmp_path / "home", monkeypatch)


@pytest.mark.parametrize("pattern", ["(.+)+#", "(.*)*#"])
def test_an_endless_pattern_is_refused(pattern, base, tmp_path, monkeypatch, offline):
    outcome = run_case(Case(train, [*base, "--target_modules", pattern], ("target_modules",)), tmp_path / "home", monkeypatch)
    assert "takes more than" in outcome.message


def test_the_base_of_all_cases_is_accepted(base, tmp_path, monkeypatch, offline):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 0.002\n")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    arguments = [*base, "--config", str(tmp_path / "recipe.yaml"), "--deepspeed", str(tmp_path / "zero.json")]
    assert run_case(Case(train, arguments, ()), tmp_path / "home", monkeypatch).accepted
