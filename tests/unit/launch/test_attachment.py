import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adakron import models
from adakron.config import AdapterConfig
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.errors import CheckpointError, ConfigError
from launch import attachment
from launch.arguments import parse_train, read_method_config
from tests.helpers.architectures import tiny_model
from tests.helpers.launch import ROOT

PLAIN = DeepSpeedSettings(config={}, stage=2, precision="bf16")


def test_settings_of_a_method_are_recorded_by_content(tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text("r: 4\nlora_dropout: 0.1\n")
    for given in (str(file), "{r: 4, lora_dropout: 0.1}", '{"r": 4, "lora_dropout": 1e-1}'):
        config = parse_train(["--method", "lora", "--method_config", given])
        assert json.loads(config.adapter.method_config or "") == {"r": 4, "lora_dropout": 0.1}
    assert json.loads(read_method_config('{"lora_alpha": 1e-4}')) == {"lora_alpha": 1e-4}  # which YAML reads as a word


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no-such-file.yaml", "cannot be read .*name a JSON or YAML file"),
        ("{r: 4", "neither JSON nor YAML"),
        ("{r: 4, r: 8}", "key r appears twice"),
        ("[4]", "cannot be read"),
    ],
)
def test_settings_that_cannot_be_read_are_named(given, message):
    with pytest.raises(ConfigError, match=f"--method_config .*{message}"):
        parse_train(["--method", "lora", "--method_config", given])


def test_a_file_without_settings_by_name_is_refused(tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text("- 4\n")
    with pytest.raises(ConfigError, match="must hold settings by name"):
        read_method_config(str(file))


def test_our_methods_take_no_such_settings():
    with pytest.raises(ConfigError, match="method_config belongs to methods of PEFT's"):
        parse_train(["--method_config", "{r: 4}"])


def test_a_method_that_nobody_has_is_refused_before_anything_is_read():
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"PEFT has no method 'adakorn'"):
        attachment.check_method(AdapterConfig(method="adakorn"), PLAIN)
    attachment.check_method(AdapterConfig(method="adakron"), PLAIN)


def test_without_peft_its_methods_are_refused_and_ours_are_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    attachment.check_method(AdapterConfig(), PLAIN)
    with pytest.raises(ConfigError, match=r"method 'lora' is none of ours \(adakron, .*pip install 'adakron\[peft\]'"):
        attachment.check_method(AdapterConfig(method="lora"), PLAIN)
    with pytest.raises(ConfigError, match="is not installed"):
        attachment.read_head(Path("anywhere"), AdapterConfig(method="lora"))


def test_our_own_methods_do_not_import_peft():
    code = "import sys, launch.train, launch.saved_run; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_folder_of_another_program_is_said_to_be_one(tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(CheckpointError, match=r"holds no backbone\.json"):
        attachment.read_head(tmp_path, AdapterConfig(method="lora"))


def test_a_saved_run_gets_its_precision_as_deepspeed_gives_it():
    model = tiny_model("bert")
    models.adapt(model, AdapterConfig(method="adamix", bottleneck_dim=8, expert_scores="random"), seed=0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    models.cast_parameters(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert before and all(
        torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype for name, buffer in model.named_buffers()
    )
