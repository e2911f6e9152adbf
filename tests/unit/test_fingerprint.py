import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration, T5Model

from adakron.adapter_folder import read_adapter_config
from adakron.adapter_io import load_into, save_adapter
from adakron.backbone import load_backbone
from adakron.config import AdapterConfig, ModelConfig
from adakron.errors import CheckpointError
from adakron.fingerprint import BackboneFingerprint, backbone_differences, take_fingerprint
from adakron.models import adapt
from tests.helpers import tiny
from tests.helpers.architectures import SIZES, tiny_model

CONFIG = AdapterConfig(bottleneck_dim=8)
OPTIONS: dict[str, Any] = {"num_labels": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_bert(tmp_path_factory.mktemp("base"))


def load(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = ModelConfig(model_name_or_path=str(folder))
    base = load_backbone(config, auto_class="AutoModelForSequenceClassification", options=OPTIONS, seed=seed, dtype=dtype)
    return base.model, base.tokenizer


def save(folder: Path, base_folder: Path, method: str = "adakron") -> Path:
    """An adapter folder as a run leaves it, whose tensors differ from every fresh one."""
    model, tokenizer = load(base_folder)
    adapter = AdapterConfig(**(CONFIG.to_dict() | {"method": method}))
    fingerprint = take_fingerprint(model, tokenizer)
    info = adapt(model, adapter, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_adapter(
        folder, tensors=tensors, adapter=adapter, info=info, base_model="some/model", auto_class="AutoModelForSequenceClassification",
        model_options=OPTIONS, backbone=fingerprint,
    )  # fmt: skip
    return folder


def refused(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"was trained on another backbone \(some/model\).*--allow_other_backbone") as caught:
        load_into(model, folder, tokenizer=tokenizer)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {name: value.tolist() for name, value in before.items()}
    return str(caught.value)


def test_the_same_backbone_loads_from_anywhere_in_any_precision(base_folder: Path, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", base_folder)
    moved = Path(shutil.move(shutil.copytree(base_folder, tmp_path / "first"), tmp_path / "second"))
    for folder in (base_folder, moved):
        # Another seed gives another head, which is no part of the backbone.
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model, tokenizer = load(folder, dtype, seed=5)
            load_into(model, adapter, tokenizer=tokenizer)
            # And once more over its own adapters.
            load_into(model, adapter, tokenizer=tokenizer)


def test_another_backbone_of_the_same_shape_is_refused(base_folder: Path, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", base_folder)
    model, tokenizer = load(tiny.save_tiny_bert(tmp_path / "other", seed=1))
    message = refused(model, adapter, tokenizer)
    # Of the samples, only biases and LayerNorm weights, which a random model starts at 0 and 1, can agree.
    assert int(message.split("weights: ")[1].split(" of 16 ")[0]) >= 12
    assert "tokenizer" not in message and "embeddings" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tuned_copy_is_refused(dtype: torch.dtype, base_folder: Path, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", base_folder)
    model, _ = load(base_folder, dtype)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.mul_(1.0001 if dtype == torch.float32 else 1.05)
    assert "of 16 sampled weights differ" in refused(model, adapter)


def test_changes_are_seen_at_the_sampled_positions_only(base_folder: Path) -> None:
    model, _ = load(base_folder)
    fingerprint = take_fingerprint(model)
    sampled = {sample.name for sample in fingerprint.weights}
    assert len(sampled) == 16 and len(json.dumps(fingerprint.to_dict())) < 8000
    name = next(name for name, _ in model.base_model.named_parameters() if name not in sampled and not name.startswith("pooler"))
    with torch.no_grad():
        model.base_model.get_parameter(name).add_(1.0)
    assert backbone_differences(fingerprint, model) == []
    # A value that only the hash covers.
    matrix = next(sample.name for sample in fingerprint.weights if sample.name.endswith("query.weight"))
    weight = model.base_model.get_parameter(matrix)
    place = int(20 * 0.6180339887498949 % 1.0 * weight.numel())
    with torch.no_grad():
        weight.view(-1)[place] += 1e-6
    (difference,) = backbone_differences(fingerprint, model)
    assert difference.startswith("weights: 1 of 16") and matrix in difference


def test_a_swapped_token_is_refused(base_folder: Path, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", base_folder)
    model, tokenizer = load(base_folder)
    folder = shutil.copytree(base_folder, tmp_path / "swapped")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    message = refused(model, adapter, AutoTokenizer.from_pretrained(folder))
    assert "tokenizer: other tokens, or other ids for them, though both have 27" in message and "weights" not in message
    # What calls leave behind, and where a tokenizer lies, make no other one.
    tokenizer(["a film", "the plot was quite long"], padding=True, truncation=True, max_length=3)
    tokenizer.model_max_length, tokenizer.padding_side = 17, "left"
    load_into(model, adapter, tokenizer=tokenizer)


def test_another_pipeline_and_other_special_tokens_are_refused(base_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(base_folder)
    fingerprint = take_fingerprint(model, tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["normalizer"] = {"type": "Lowercase"}
    lower = copy.deepcopy(tokenizer)
    lower._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    assert lower("THE film")["input_ids"] != tokenizer("THE film")["input_ids"]
    (difference,) = backbone_differences(fingerprint, model, lower)
    assert difference.startswith("tokenizer: the same vocabulary, but other ids for the same text")
    swapped = copy.deepcopy(tokenizer)
    swapped.cls_token, swapped.sep_token = "[SEP]", "[CLS]"
    assert backbone_differences(fingerprint, model, swapped)[:2] == [
        "tokenizer: cls token saved 2, here 3",
        "tokenizer: sep token saved 3, here 2",
    ]
    swapped = copy.deepcopy(tokenizer)
    swapped.pad_token = "[UNK]"
    assert backbone_differences(fingerprint, model, swapped) == []
    assert backbone_differences(take_fingerprint(model), model, tokenizer) == []


def test_every_difference_of_another_architecture_is_named(tmp_path: Path) -> None:
    fingerprint = take_fingerprint(tiny_model("bert"))
    found = "; ".join(backbone_differences(fingerprint, tiny_model("roberta", num_hidden_layers=3, hidden_size=48, vocab_size=51)))
    for difference in (
        "model type: saved bert, here roberta", "class: saved BertModel, here RobertaModel", "hidden size: saved 32, here 48",
        "layers: saved 2, here 3", "vocabulary size of the embedding: saved 50, here 51", "number of weights: saved 37, here 53",
        "weights: ",
    ):  # fmt: skip
        assert difference in found
    wider = backbone_differences(fingerprint, tiny_model("bert", intermediate_size=65))
    assert wider[0].startswith("names or shapes of the weights: ") and len(wider) == 2


@pytest.mark.parametrize("model_type", SIZES)
def test_head_class_and_adapters_make_no_difference(model_type: str) -> None:
    model = tiny_model(model_type)
    model.init_weights()
    fingerprint = take_fingerprint(model)
    plain = tiny_model(model_type, auto_class="AutoModel")
    own = {name: value for name, value in model.base_model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(own, strict=False)
    assert backbone_differences(fingerprint, plain) == [] == backbone_differences(take_fingerprint(plain), model)
    adapt(model, AdapterConfig(bottleneck_dim=8, position="ffn"), seed=0)
    assert take_fingerprint(model) == fingerprint


def test_a_sequence_to_sequence_model_and_its_language_model_agree() -> None:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, num_layers=1, num_heads=2, d_ff=8, tie_word_embeddings=False)
    model = T5ForConditionalGeneration(config)
    plain = T5Model(config)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert backbone_differences(take_fingerprint(model), plain) == []


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_what_the_adapter_brings_itself_is_not_compared(method: str, base_folder: Path, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", base_folder, method)
    model, tokenizer = load(base_folder)
    before = take_fingerprint(model)
    load_into(model, adapter, tokenizer=tokenizer)
    assert take_fingerprint(model) != before
    load_into(model, adapter, tokenizer=tokenizer)
    # Biases can be loaded over another backbone's, matrices not.
    other, _ = load(tiny.save_tiny_bert(tmp_path / "other", seed=1))
    if method == "bitfit":
        compared = int(refused(other, adapter).split(" sampled weights differ")[0].rsplit(" ", 1)[1])
        assert 12 <= compared < 16
    else:
        load_into(other, adapter)
        assert all(torch.equal(value, model.get_parameter(name)) for name, value in other.named_parameters())


def test_the_flag_overrides_with_a_warning(base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = save(tmp_path / "adapter", base_folder)
    other, tokenizer = load(tiny.save_tiny_bert(tmp_path / "other", seed=1))
    with caplog.at_level(logging.WARNING):
        info = load_into(other, adapter, tokenizer=tokenizer, allow_other_backbone=True)
    assert len(info.sites) == 2 and "sampled weights differ" in caplog.text


def test_folders_without_a_fingerprint_load_and_broken_ones_do_not(base_folder: Path, tmp_path: Path) -> None:
    config = save(tmp_path, base_folder) / "adapter_config.json"
    content = json.loads(config.read_text())
    assert read_adapter_config(tmp_path).backbone == BackboneFingerprint.from_dict(content["backbone"])
    other, tokenizer = load(tiny.save_tiny_bert(tmp_path / "other", seed=1))
    for older in ({key: value for key, value in content.items() if key != "backbone"}, content | {"backbone": None}):
        config.write_text(json.dumps(older))
        load_into(other, tmp_path, tokenizer=tokenizer)
    sample = content["backbone"]["weights"][0]
    for broken in (5, [], {"model_type": "bert"}, content["backbone"] | {"weights": [sample | {"dtype": "nonsense"}]}):
        config.write_text(json.dumps(content | {"backbone": broken}))
        with pytest.raises(CheckpointError, match="backbone is not a fingerprint of this version's"):
            load_into(other, tmp_path)


def test_quantised_weights_are_skipped(base_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load(base_folder)
    fingerprint = take_fingerprint(model)
    for layer in model.base_model.encoder.layer:
        for linear in (layer.intermediate.dense, layer.output.dense):
            packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
            linear.weight = nn.Parameter(packed, requires_grad=False)
    with caplog.at_level(logging.INFO):
        assert backbone_differences(fingerprint, model) == []
    assert "of 16 sampled weights of the backbone are quantised" in caplog.text
    quantised = take_fingerprint(model)
    assert quantised.names_and_shapes is None and {sample.dtype for sample in quantised.weights} == {"float32"}
    assert backbone_differences(quantised, load(base_folder)[0]) == []
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight.add_(0.1)
    assert backbone_differences(fingerprint, model)


def test_weights_without_values_have_no_fingerprint(base_folder: Path) -> None:
    model, _ = load(base_folder)
    with torch.device("meta"):
        meta = AutoModel.from_config(model.config)
    with pytest.raises(CheckpointError, match=r"holds no values here.*meta device"):
        take_fingerprint(meta)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(CheckpointError, match=r"holds no values here \(shape \(0,\)\)"):
        take_fingerprint(model)
