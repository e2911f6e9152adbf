import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from adakron import atomic
from adakron.adapter_folder import read_adapter_config
from adakron.adapter_io import load_into, read_adapter_tensors, save_adapter
from adakron.backbone import NewParameters
from adakron.config import AdapterConfig
from adakron.errors import CheckpointError
from adakron.models import adapt, adapter_buffers
from adakron.trainable import AdaptedModelInfo
from tests.helpers.architectures import SIZES, tiny_batch, tiny_model

CONFIG = AdapterConfig(bottleneck_dim=12, kron_factor=3, factor_order="b_major", activation="relu", init_std=0.3)
OPTIONS: dict[str, Any] = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(folder: Path, tensors: dict[str, Tensor], info: AdaptedModelInfo, adapter: AdapterConfig = CONFIG, **options: Any) -> None:
    settings = {"auto_class": "AutoModelForSequenceClassification", "model_options": OPTIONS, "base_model": "some/model"} | options
    save_adapter(folder, tensors=tensors, adapter=adapter, info=info, **settings)


def make(folder: Path, model_type: str = "bert", adapter: AdapterConfig = CONFIG) -> PreTrainedModel:
    """A saved model whose adapters and head differ from every fresh one."""
    model = tiny_model(model_type)
    info = adapt(model, adapter, seed=9)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter))
    save(folder, trained(model) | adapter_buffers(model, info), info, adapter)
    return model


@pytest.mark.parametrize("model_type", SIZES)
@pytest.mark.parametrize("method", ["adakron", "head", "madakron", "adamix", "houlsby", "full"])
def test_roundtrip_is_bit_equal(model_type: str, method: str, tmp_path: Path) -> None:
    adapter = AdapterConfig(**(CONFIG.to_dict() | {"method": method}))
    model = make(tmp_path, model_type, adapter)
    fresh = tiny_model(model_type)
    before = fresh(**tiny_batch()).logits
    info = load_into(fresh, tmp_path)
    assert trained(fresh).keys() == trained(model).keys() and bool(info.sites) == adapter.has_adapters
    for name, parameter in trained(model).items():
        assert torch.equal(fresh.get_parameter(name), parameter), name
    logits = fresh(**tiny_batch()).logits
    assert torch.equal(logits, model(**tiny_batch()).logits) and not torch.equal(logits, before)


def test_layout_on_disk(tmp_path: Path) -> None:
    make(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    sites = ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"]
    expected = {
        "peft_type": "ADAKRON", "task_type": "SEQ_CLS", "base_model_name_or_path": "some/model", "inference_mode": True,
        "target_modules": sites, "modules_to_save": ["classifier"], "bottleneck_dim": 12, "kron_factor": 3, "factor_order": "b_major",
    }  # fmt: skip
    assert expected.items() <= content.items()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = [f"{site}.adakron_adapter.{layer}" for site in sites for layer in ("down_a", "down_b", "up")]
    assert tensors.keys() == {f"base_model.model.{layer}.{kind}" for layer in [*layers, "classifier"] for kind in ("weight", "bias")}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_configuration_comes_back(tmp_path: Path) -> None:
    pattern = r".*layer\.1\.output\.dense"
    adapter = AdapterConfig(**(CONFIG.to_dict() | {"target_modules": pattern}))
    model = tiny_model("bert")
    info = adapt(model, adapter, seed=0, new_parameters=NewParameters(("bert.pooler.dense.weight",)))
    save(tmp_path, trained(model), info, adapter, extra={"task_name": "mnli", "seed": 3})
    saved = read_adapter_config(tmp_path)
    assert saved.adapter == adapter.resolved() and saved.model_options == OPTIONS and saved.extra == {"task_name": "mnli", "seed": 3}
    assert saved.sites == ("bert.encoder.layer.1.output.dense",) and saved.head_modules == ("classifier", "bert.pooler")
    assert (saved.base_model, saved.auto_class) == ("some/model", "AutoModelForSequenceClassification")
    fresh = tiny_model("bert")
    assert load_into(fresh, tmp_path) == info
    assert fresh.get_parameter("bert.pooler.dense.weight").requires_grad


def test_loads_into_an_adapted_model_of_another_dtype(tmp_path: Path) -> None:
    model = make(tmp_path)
    other = tiny_model("bert").bfloat16()
    adapt(other, CONFIG, seed=1)
    load_into(other, tmp_path)
    for name, parameter in trained(model).items():
        assert torch.equal(other.get_parameter(name), parameter.bfloat16())
    assert read_adapter_tensors(tmp_path).keys() == trained(model).keys()


def test_a_head_with_buffers_and_shared_parameters(tmp_path: Path) -> None:
    """Position ids, which no folder holds, and token embeddings that the frozen output projection shares, which do not train."""
    adapter = AdapterConfig(**(CONFIG.to_dict() | {"head_modules": "bert.embeddings,classifier"}))
    model = make(tmp_path, adapter=adapter)
    fresh = tiny_model("bert")
    position_ids = fresh.get_buffer("bert.embeddings.position_ids").clone()
    info = load_into(fresh, tmp_path)
    assert info.head_modules == ("bert.embeddings", "classifier")
    assert torch.equal(fresh(**tiny_batch()).logits, model(**tiny_batch()).logits)
    assert torch.equal(fresh.get_buffer("bert.embeddings.position_ids"), position_ids)
    with torch.no_grad():
        model.get_parameter("bert.embeddings.word_embeddings.weight").add_(1.0)
    load_into(model, tmp_path)
    assert torch.equal(model(**tiny_batch()).logits, fresh(**tiny_batch()).logits)
    tied = tiny_model("bert", auto_class="AutoModelForMaskedLM")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    info = adapt(tied, CONFIG, seed=9, heads=("bert.embeddings",))
    save(tmp_path / "tied", trained(tied), info, auto_class="AutoModelForMaskedLM", model_options={})
    again = tiny_model("bert", auto_class="AutoModelForMaskedLM")
    load_into(again, tmp_path / "tied")
    assert torch.equal(again(**tiny_batch()).logits, tied(**tiny_batch()).logits)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("adakron", {"factor_order": "a_major"}, "factor_order is a_major in the adapters at {sites}, and was saved as b_major"),
        ("adakron", {"activation": "gelu"}, "activation is gelu in the adapters at {sites}, and was saved as relu"),
        ("madakron", {"inference_level": 0}, "inference_level is 0 in the adapters at {sites}, and was saved as 3"),
        ("madakron", {"inference_level": 0, "activation": "silu"}, "activation is silu .*; inference_level is 0 "),
        ("madakron", {"experts_in": "down_a"}, "experts_in is down_a in the adapters at {sites}, and was saved as down_a,down_b"),
        ("pfeiffer", {"activation": "gelu"}, "activation is gelu in the adapters at {sites}, and was saved as relu"),
        ("pfeiffer", {"factor_order": "a_major"}, None),
        ("madakron", {"experts_in": "down_b,down_a"}, None),
    ],
)
def test_adapters_that_compute_something_else(method: str, change: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    settings = CONFIG.to_dict() | {"method": method}
    make(tmp_path, adapter=AdapterConfig(**settings))
    other = tiny_model("bert")
    info = adapt(other, AdapterConfig(**(settings | change)), seed=1)
    if message is None:
        load_into(other, tmp_path)
        return
    before = other.get_parameter("classifier.bias").clone()
    with pytest.raises(CheckpointError, match=message.format(sites=", ".join(info.sites))):
        load_into(other, tmp_path)
    assert torch.equal(other.get_parameter("classifier.bias"), before)


def test_views_of_one_buffer_and_half_precision_are_saved_as_whole_float32(tmp_path: Path) -> None:
    model = tiny_model("bert")
    info = adapt(model, CONFIG, seed=0)
    flat = torch.cat([parameter.detach().flatten() for parameter in trained(model).values()]).bfloat16()
    parts = flat.split([parameter.numel() for parameter in trained(model).values()])
    views = {name: part.view(parameter.shape) for part, (name, parameter) in zip(parts, trained(model).items(), strict=True)}
    save(tmp_path, views, info)
    for name, tensor in read_adapter_tensors(tmp_path).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, views[name].float())


def test_refuses_to_write_what_is_not_exactly_the_adapter(tmp_path: Path) -> None:
    model = tiny_model("bert")
    info = adapt(model, CONFIG, seed=0)
    tensors = trained(model)
    first = f"{info.sites[0]}.adakron_adapter.up.weight"
    for wrong, message in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, f"missing: {first}"),
        ({name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}, r"missing: classifier\.\*"),
        (tensors | {"bert.pooler.dense.bias": torch.ones(2)}, "neither adapters nor head: bert.pooler.dense.bias"),
        (tensors | {first: torch.empty(0)}, f"{first} is empty .a ZeRO stage 3 partition"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "out", wrong, info)
        assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    info = AdaptedModelInfo(read_adapter_config(tmp_path).sites, ("classifier",))
    zeros = {name: torch.zeros_like(parameter) for name, parameter in trained(model).items()}
    with pytest.raises(TypeError):
        save(tmp_path, zeros, info, extra={"not": object()})

    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    # Whether the disk fills up while the bytes are written or just before the finished file gets its name.
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, call, full_disk)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, zeros, info)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_a_setting_that_went_to_the_run_may_still_be_there(tmp_path: Path) -> None:
    model = make(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    assert "merge_experts" not in content
    path.write_text(json.dumps(content | {"merge_experts": False}))
    fresh = tiny_model("bert")
    load_into(fresh, tmp_path)
    assert torch.equal(fresh(**tiny_batch()).logits, model(**tiny_batch()).logits)


def test_unreadable_folders(tmp_path: Path) -> None:
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match=r"not an adapter folder: it has no adapter_config.json"):
        load_into(tiny_model("bert"), tmp_path)
    make(tmp_path)
    content = json.loads(config.read_text())
    without = {key: value for key, value in content.items() if key not in ("kron_factor", "auto_class")}
    for text, message in (
        ("{", "cannot read"),
        ("[]", "must hold a JSON object"),
        (json.dumps(content | {"peft_type": "LORA"}), "peft_type is 'LORA'.*load other adapters with PEFT"),
        (json.dumps(content | {"format_version": 3}), "format_version is 3, this release reads 1 to 2"),
        (json.dumps(without), "auto_class is missing; kron_factor is missing"),
        (json.dumps(content | {"target_modules": "x"}), "target_modules must be a list, got 'x'"),
        (json.dumps(content | {"kron_factor": 5}), r"bottleneck_dim \(12\) must be divisible by kron_factor \(5\)"),
        (json.dumps(content | {"activation": "tanh"}), "activation is 'tanh'"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_adapter_config(tmp_path)
    config.write_text(json.dumps(content))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"cannot read .*adapter_model.safetensors"):
        load_into(tiny_model("bert"), tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"not a complete adapter folder: it has no adapter_model.safetensors"):
        load_into(tiny_model("bert"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"bottleneck_dim": 12.0, "target_pattern": 5},
            ["bottleneck_dim must be a whole number, got 12.0", "target_pattern must be"],
        ),
        ({"kron_factor": True, "init_std": "x"}, ["kron_factor must be a whole number, got True", "init_std must be a number, got 'x'"]),
        ({"modules_to_save": [1], "extra": None}, ["modules_to_save must list names, got [1]", "extra must be an object, got None"]),
        ({"activation": ["gelu"]}, ["activation is ['gelu']; it must be one of"]),
    ],
)
def test_tampered_settings_are_all_named(changes: dict[str, Any], messages: list[str], tmp_path: Path) -> None:
    make(tmp_path)
    config = tmp_path / "adapter_config.json"
    content = json.loads(config.read_text())
    # Together with a fault of the labels: one error for all.
    config.write_text(json.dumps(content | changes | {"model_options": OPTIONS | {"num_labels": 5}}))
    with pytest.raises(CheckpointError) as caught:
        read_adapter_config(tmp_path)
    assert str(caught.value).startswith(f"{config}: ")
    for message in [*messages, "num_labels is 5, but id2label has 3 classes"]:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"x": "a", "1": "b", "2": "c"}}, "id2label must map 0, 1, ... to names, got {'x': 'a'"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "id2label must map 0, 1, ... to names"),
        ({"id2label": {"0": 1, "1": 2, "2": 3}}, "id2label must map 0, 1, ... to names"),
        ({"id2label": ["a", "b", "c"]}, "id2label must be an object, got ['a', 'b', 'c']"),
        ({"id2label": None}, "id2label is missing"),
        ({"num_labels": None}, "num_labels is missing"),
        ({"num_labels": "3"}, "num_labels must be a whole number, got '3'"),
        ({"num_labels": 2}, "num_labels is 2, but id2label has 3 classes"),
        ({"label2id": {"a": 0, "b": 2, "c": 1}}, "label2id {'a': 0, 'b': 2, 'c': 1} is not the inverse of id2label"),
        ({"problem_type": "regression", "id2label": None, "label2id": None, "num_labels": 0}, "num_labels is 0; it must be at least 1"),
    ],
)
def test_tampered_labels(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(tmp_path)
    config = tmp_path / "adapter_config.json"
    options = {key: value for key, value in (OPTIONS | changes).items() if value is not None}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_options": options}))
    with pytest.raises(CheckpointError) as caught:
        read_adapter_config(tmp_path)
    assert f"{config}: model_options: {message}" in str(caught.value) and "; " not in str(caught.value).replace("; it must", "")


def test_options_without_classes(tmp_path: Path) -> None:
    for auto_class, options in (
        ("AutoModelForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}),
        ("AutoModelForCausalLM", {}),
    ):
        model = tiny_model("bert")
        info = adapt(model, CONFIG, seed=0)
        save(tmp_path, trained(model), info, auto_class=auto_class, model_options=options)
        assert read_adapter_config(tmp_path).model_options == options


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    make(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    good = load_file(weights)
    site = "base_model.model.bert.encoder.layer.1.output.dense.adakron_adapter"
    head = "base_model.model.classifier.weight"

    def refused(tensors: dict[str, Tensor], message: str) -> None:
        save_file(tensors, weights)
        model = tiny_model("bert")
        before = model.get_parameter("classifier.bias").clone()
        with pytest.raises(CheckpointError, match=message):
            load_into(model, tmp_path)
        assert torch.equal(model.get_parameter("classifier.bias"), before)

    refused({key: tensor for key, tensor in good.items() if key != f"{site}.up.bias"}, "tensors are missing: .*layer.1.*up.bias")
    refused({key: tensor for key, tensor in good.items() if key != head}, "missing classifier.weight")
    refused(good | {"classifier.extra": torch.ones(1)}, "keys without the prefix 'base_model.model.': classifier.extra")
    refused(good | {f"{site}.scale": torch.ones(1)}, "neither adapters nor head: .*scale")
    refused(good | {head: torch.ones(2, 32)}, r"classifier.weight has shape \(2, 32\), the model's is \(3, 32\)")


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit RobertaForSequenceClassification: the model has no module bert.encoder"):
        load_into(tiny_model("roberta"), tmp_path)
    wide = tiny_model("bert", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"down_a.weight has shape \(3, 32\), the model's is \(3, 64\)"):
        load_into(wide, tmp_path)
    deeper = tiny_model("bert", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"nothing is saved for the adapter at bert.encoder.layer.2.output.dense"):
        load_into(deeper, tmp_path)
