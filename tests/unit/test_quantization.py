import dataclasses

import pytest
import torch

from adakron import quantization
from adakron.architecture import load_config
from adakron.backbone import load_backbone
from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.errors import ConfigError
from adakron.quantization import quantization_config
from tests.helpers.tiny import save_tiny_bert

EIGHT, FOUR = ModelConfig(quantization="8bit"), ModelConfig(quantization="4bit")


def run_config(model: ModelConfig, adapter: AdapterConfig) -> RunConfig:
    return RunConfig(model=model, adapter=adapter, data=DataConfig(), training=TrainingConfig(), deepspeed="zero2.json")


def test_what_transformers_is_told():
    assert quantization_config(ModelConfig(), ["classifier"], torch.float32) is None
    eight = quantization_config(EIGHT, ["classifier", "bert.pooler"], torch.float32)
    assert eight.load_in_8bit and not eight.load_in_4bit and eight.llm_int8_skip_modules == ["classifier", r"bert\.pooler"]
    four = quantization_config(FOUR, [], torch.bfloat16)
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.bfloat16 and four.llm_int8_skip_modules is None


@pytest.mark.parametrize("config", [EIGHT, FOUR])
def test_a_missing_library_is_an_early_error(monkeypatch, tmp_path, config):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    config = dataclasses.replace(config, model_name_or_path=str(tmp_path / "not even a folder"))
    with pytest.raises(ConfigError, match=f"quantization {config.quantization} needs the package bitsandbytes.*pip install"):
        load_config(config, {})


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (AdapterConfig(method="full"), "method full trains the backbone.*drop --quantization"),
        (AdapterConfig(head_modules="classifier"), "head_modules names what trains"),
    ],
)
def test_what_would_train_quantised_weights_is_refused(adapter, said):
    with pytest.raises(ConfigError, match=said):
        run_config(EIGHT, adapter)
    run_config(ModelConfig(), adapter)


def test_a_saved_run_remembers_its_quantisation():
    config = run_config(EIGHT, AdapterConfig())
    assert RunConfig.from_dict(config.to_dict()).model.quantization == "8bit"


def test_the_head_is_left_out_and_the_weights_are_read_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    save_tiny_bert(tmp_path)
    seen = []

    class Told(Exception):
        pass

    def told(config, keep, compute_dtype):
        seen.append((config.quantization, tuple(keep), compute_dtype))
        raise Told

    monkeypatch.setattr("adakron.backbone.quantization_config", told)
    model = dataclasses.replace(FOUR, model_name_or_path=str(tmp_path))
    with pytest.raises(Told):
        load_backbone(
            model, auto_class="AutoModelForSequenceClassification", options={"num_labels": 3}, seed=0, compute_dtype=torch.bfloat16
        )
    assert seen == [("4bit", ("classifier",), torch.bfloat16)]
