"""`import adakron`: cheap, and what it offers from Python."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2Model

import adakron
from adakron.errors import CheckpointError
from tests.helpers.architectures import tiny_batch, tiny_model

LABELS: dict[str, Any] = {"num_labels": 3, "id2label": {0: "no", 1: "maybe", 2: "yes"}}


def make(folder: Path, model_type: str = "bert", auto_class: str = "AutoModelForSequenceClassification", **settings: Any) -> torch.Tensor:
    """A base model and an adapter folder, made with nothing but the public names; the logits."""
    model = tiny_model(model_type, auto_class=auto_class)
    model.save_pretrained(folder / "base")
    adapter = adakron.AdapterConfig(bottleneck_dim=8, **settings)
    info = adakron.adapt(model, adapter, seed=5)
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in tensors.values():
            parameter.add_(0.1)
        logits: torch.Tensor = model(**tiny_batch()).logits
    adakron.save_adapter(
        folder / "adapter", tensors=tensors, adapter=adapter, info=info, base_model=str(folder / "base"), auto_class=auto_class,
        model_options=LABELS if "Classification" in auto_class else {},
    )  # fmt: skip
    return logits


def test_the_adapted_model_comes_back(tmp_path: Path) -> None:
    logits = make(tmp_path)
    backbone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = adakron.load_adapter(backbone.train(), tmp_path / "adapter")
    assert model is backbone and not model.training
    assert any(isinstance(module, adakron.BottleneckAdapter) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch()).logits, logits)
    assert model.config.id2label == LABELS["id2label"] and model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}


@pytest.mark.parametrize("labels", [2, 5])
def test_another_number_of_labels(tmp_path: Path, labels: int) -> None:
    make(tmp_path)
    backbone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    message = rf"has 3 labels \(no, maybe, yes\), and this BertForSequenceClassification has {labels}; load .*num_labels=3\)"
    with pytest.raises(CheckpointError, match=message):
        adakron.load_adapter(backbone, tmp_path / "adapter")
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_a_model_without_the_head(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError, match=r"a head for classifier and adapters for .* this BertModel does not have; .*SequenceClassif"):
        adakron.load_adapter(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_decoder_without_its_output_layer(tmp_path: Path) -> None:
    make(tmp_path, "gpt2", "AutoModelForCausalLM")
    with pytest.raises(
        CheckpointError, match=r"adapters for transformer.h.0.*GPT2Model does not have; .*AutoModelForCausalLM.from_pretrained"
    ):
        adakron.load_adapter(GPT2Model.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, adakron; print(sorted({'torch', 'transformers', 'numpy', 'deepspeed'} & {*sys.modules}), adakron.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["[]", adakron.__version__]


def test_names() -> None:
    assert {*adakron.__all__} <= {*dir(adakron)}
    for name in adakron.__all__:
        assert getattr(adakron, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'adakron' has no attribute 'load_adaptor'"):
        _ = adakron.load_adaptor
