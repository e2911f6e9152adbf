import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adakron import adapter_folder, backbone, models
from adakron.config import AdapterConfig, ModelConfig
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.errors import CheckpointError, ConfigError
from launch import attachment
from launch.arguments import parse_train, read_method_config
from tests.helpers.architectures import tiny_batch, tiny_model
from tests.helpers.launch import ROOT
from tests.helpers.tiny import save_tiny_bert

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


@pytest.mark.parametrize("method", ["madakron", "lora"])
def test_what_a_run_writes_it_reads_again(method, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    config = ModelConfig(model_name_or_path=str(save_tiny_bert(tmp_path / "base")))
    options = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    auto_class = "AutoModelForSequenceClassification"

    def load():
        return backbone.load_backbone(config, auto_class=auto_class, options=options, seed=1)

    adapter = AdapterConfig(method=method, bottleneck_dim=8).resolved() if method == "madakron" else AdapterConfig(method=method)
    attached = attachment.attach(load(), adapter, 3, torch.float32)
    tensors = {name: p.detach().add_(0.1) for name, p in attached.model.named_parameters() if p.requires_grad}
    attached.folder.write(tmp_path / "run", tensors, auto_class=auto_class, model_options=options)
    assert attachment.read_head(tmp_path / "run", adapter) == (auto_class, options)
    loaded = attachment.load(load(), tmp_path / "run", adapter, torch.float32, allow_other_backbone=False)
    batch = tiny_batch()
    batch["input_ids"] %= 20
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, attached.model.eval()(**batch).logits)
    if method == "madakron":
        attached.folder.write(tmp_path / "merged", tensors, auto_class=auto_class, model_options=options, merge=True)
        assert adapter_folder.read_adapter_config(tmp_path / "merged").adapter.num_experts == 1
        assert adapter_folder.read_adapter_config(tmp_path / "run").adapter.num_experts == 4


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


@pytest.mark.parametrize(("method", "draws"), [("pvera", True), ("lora", False), ("adakron", False)])
def test_noise_of_a_method_makes_two_passes_differ(method, draws):
    if method != "adakron":
        pytest.importorskip("peft")
    assert attachment.draws_noise(AdapterConfig(method=method)) is draws
