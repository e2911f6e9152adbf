"""PEFT's methods in our trainer, without a launcher: every method that PEFT has is trained and loaded again, or refused."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adakron import models, placement, trainable
from adakron.backbone import NewParameters
from adakron.config import AdapterConfig, GenerationConfig
from adakron.decoding import BeamDecoder
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import take_fingerprint
from adakron.peft import folders
from adakron.peft.method_settings import REFUSED, TAKE_CONV1D, available, check_run, method_config
from adakron.peft.methods import Attached, attach, quiet_peft
from tests.helpers.architectures import tiny_batch, tiny_model
from tests.helpers.peft_worker import SETTINGS
from tests.helpers.tiny import save_byte_gpt2

BATCH = tiny_batch()


def adapter(method: str, **settings: Any) -> AdapterConfig:
    given = SETTINGS.get(method, {}) | settings
    return AdapterConfig(method=method, method_config=json.dumps(given) if given else None)


def trained(attached: Attached) -> dict[str, Tensor]:
    return {name: p for name, p in attached.model.named_parameters() if p.requires_grad}


def train(attached: Attached, steps: int = 3) -> list[float]:
    groups = trainable.trainable_groups(attached.model, 0.0, attached.vectors)
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    losses = []
    attached.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(attached.model(**BATCH).logits, torch.tensor([0, 1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    attached.model.eval()
    return losses


@pytest.mark.parametrize("method", available())
def test_every_method_trains_saves_and_loads_with_the_same_numbers(method, tmp_path):
    model = tiny_model("bert")
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    attached = attach(model, adapter(method), seed=3)
    trainable.assert_trainable(attached.model, attached.info)
    report = trainable.parameter_report(attached.model, attached.info)
    assert report.adapter == sum(p.numel() for p in trained(attached).values()) - report.head
    assert (report.head, report.backbone) == (99, sum(p.numel() for p in frozen.values()) - 99)
    losses = train(attached)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in trained(attached).values())
    for name, before in frozen.items():
        now = dict(model.named_parameters())
        same = [p for other, p in now.items() if other.replace(".base_layer", "") == name]
        assert "classifier" in name or any(torch.equal(p, before) for p in same), name
    folders.save(
        tmp_path,
        attached,
        tensors=trained(attached),
        base_model="some/model",
        auto_class="AutoModelForSequenceClassification",
        model_options={},
    )
    torch.manual_seed(99)
    expected = attached.model(**BATCH).logits
    assert torch.equal(folders.load(tiny_model("bert"), tmp_path)(**BATCH).logits, expected)
    with quiet_peft():
        assert torch.equal(PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()(**BATCH).logits, expected)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**BATCH).logits
    return found


def write(folder: Path, attached: Attached, model_options: dict[str, Any] | None = None) -> None:
    folders.save(
        folder, attached, tensors=trained(attached), base_model="some/model", auto_class="AutoModelForSequenceClassification",
        model_options=model_options or {},
    )  # fmt: skip


def test_every_method_of_peft_is_available_or_refused():
    names = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"adakron"}
    assert names == ({*available()} - {"dora"}) | (names & REFUSED.keys())
    assert not REFUSED.keys() & {*available()}
    assert REFUSED.keys() - names <= {"shadow"}  # new in 0.21


@pytest.mark.parametrize("method", available())
def test_initial_values_depend_on_the_seed_alone(method):
    states = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(noise)
        random.seed(noise)
        np.random.seed(noise)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        attached = attach(tiny_model("bert"), adapter(method), seed=seed)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
        states.append({name: p.detach() for name, p in attached.model.named_parameters()} | dict(attached.kept))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_another_seed_is_another_start():
    one, two = (trained(attach(tiny_model("bert"), adapter("lora"), seed=seed)) for seed in (1, 2))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one if "classifier" in name)


def test_the_head_is_that_of_our_methods():
    ours, theirs = tiny_model("distilbert"), tiny_model("distilbert")
    info = models.adapt(ours, AdapterConfig(method="head"), seed=3)
    attached = attach(theirs, adapter("lora", target_modules=["q_lin", "v_lin"]), seed=3)
    assert attached.info.head_modules == tuple(f"base_model.model.{name}" for name in info.head_modules)
    head = {name: p for name, p in trained(attached).items() if "lora" not in name}
    assert head.keys() == {f"base_model.model.{name}" for name, p in ours.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, ours.get_parameter(name.removeprefix("base_model.model."))) for name, p in head.items())


def test_declared_heads_and_new_poolers_train(tmp_path):
    new = NewParameters(missing=("classifier.weight", "bert.pooler.dense.weight", "bert.pooler.dense.bias"))
    attached = attach(tiny_model("bert"), adapter("lora", target_modules="all-linear"), seed=0, new_parameters=new)
    assert attached.info.head_modules == ("base_model.model.classifier", "base_model.model.bert.pooler")
    assert not any("pooler" in name or "classifier" in name for name in attached.info.adapter_parameters)
    train(attached)
    write(tmp_path, attached)
    assert torch.equal(logits(folders.load(tiny_model("bert"), tmp_path)), logits(attached.model))
    declared = AdapterConfig(method="lora", head_modules="classifier")
    with pytest.raises(ConfigError, match=r"head_modules \(classifier\) leaves out bert\.pooler"):
        attach(tiny_model("bert"), declared, seed=0, new_parameters=new)
    with pytest.raises(ConfigError, match="head_modules names nothing"):
        attach(tiny_model("bert"), AdapterConfig(method="lora", head_modules="nothing"), seed=0)


def test_the_adapter_is_gone_and_the_head_original_where_peft_disables(tmp_path):
    attached = attach(tiny_model("bert"), adapter("lora"), seed=0)
    train(attached)
    write(tmp_path, attached)
    loaded = folders.load(tiny_model("bert"), tmp_path)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_model("bert")))


def test_dora_is_lora_with_a_magnitude():
    dora = attach(tiny_model("bert"), adapter("dora", r=4), seed=0)
    same = attach(tiny_model("bert"), adapter("lora", r=4, use_dora=True), seed=0)
    assert trained(dora).keys() == trained(same).keys()
    assert any("magnitude" in name for name in dora.info.adapter_parameters)


def test_biases_that_lora_trains_are_counted_as_the_backbones_and_saved(tmp_path):
    attached = attach(tiny_model("bert"), adapter("lora", bias="all"), seed=0)
    assert all(name.endswith("bias") for name in attached.info.tuned_parameters) and attached.info.tuned_parameters
    trainable.assert_trainable(attached.model, attached.info)
    assert trainable.parameter_report(attached.model, attached.info).tuned > 0
    train(attached)
    write(tmp_path, attached)
    assert torch.equal(logits(folders.load(tiny_model("bert"), tmp_path)), logits(attached.model))


def test_vectors_are_not_decayed():
    attached = attach(tiny_model("bert"), adapter("ia3"), seed=0)
    decayed, plain = trainable.trainable_groups(attached.model, 0.1, attached.vectors)
    names = {id(p): name for name, p in trained(attached).items()}
    assert {names[id(p)] for p in decayed["params"]} == {"base_model.model.classifier.weight"}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) == len(attached.info.adapter_parameters) + 1


def decayed(config: AdapterConfig) -> set[str]:
    attached = attach(tiny_model("bert"), config, seed=0)
    names = {id(p): name for name, p in trained(attached).items()}
    groups = trainable.trainable_groups(attached.model, 0.1, attached.vectors)
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]} - {"base_model.model.classifier.weight"}


# AdaMSS splits its rank among subspaces, so that another one has other tensors; HRA takes even ranks only.
@pytest.mark.parametrize(
    "method", [name for name in available() if hasattr(method_config(adapter(name)), "r") if name not in ("adamss", "hra")]
)
def test_the_rank_does_not_decide_what_is_decayed(method):
    beside = {"gralora": {"gralora_k": 1}, "oft": {"oft_block_size": 0}}.get(method, {})
    assert decayed(adapter(method, r=1, **beside)) == decayed(adapter(method, r=2, **beside))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("beft", {}),
        ("boft", {}),
        ("dora", {"r": 1}),
        ("glora", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
        ("ia3", {}),
        ("randlora", {"r": 2}),
        ("vera", {}),
    ],
)
def test_scales_and_shifts_are_vectors_in_any_shape(method, settings):
    rotations_and_factors = ("boft_R", "lora_A", "lora_B")
    found = decayed(adapter(method, **settings))
    assert all(any(part in rotations_and_factors for part in name.split(".")) for name in found)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        attached = attach(tiny_model("bert"), adapter("lora", lora_dropout=0.3), seed=0)
        if checkpointing:
            models.checkpoint_activations(attached.model, None)
        attached.model.train()
        torch.manual_seed(5)
        F.cross_entropy(attached.model(**BATCH).logits, torch.tensor([0, 1, 2])).backward()
        gradients.append({name: p.grad for name, p in trained(attached).items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("method", REFUSED)
def test_what_would_half_work_is_refused_with_the_reason(method):
    with pytest.raises(ConfigError, match=rf"method {method} of PEFT cannot be trained here: it .*; choose another --method"):
        method_config(AdapterConfig(method=method))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("loraa", None, r"PEFT has no method 'loraa'; did you mean lora\? It has .*lora"),
        ("xyzzyx", None, r"PEFT has no method 'xyzzyx'; it has .*lora.* \(set --method\)"),
        ("lora", "[1]", "must be a JSON object"),
        ("lora", "{r}", "method_config is not a JSON object"),
        ("lora", {"rank": 4, "alpha": 1}, "method_config has rank, alpha; the settings of lora are .*lora_alpha.* r, "),
        ("lora", {"r": "4"}, "method_config: r is '4'; PEFT takes"),
        ("lora", {"use_dora": "false"}, "use_dora is 'false'; PEFT takes"),
        ("lora", {"modules_to_save": ["x"]}, "name the modules that train whole with --head_modules"),
        ("lora", {"task_type": "SEQ_CLS"}, "method_config has task_type"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the backbone or needs data first"),
        ("lora", {"layer_replication": [[0, 1]]}, "layer_replication for lora, which repeats layers of the backbone"),
        ("trainable_tokens", None, "needs token_indices; give it in --method_config"),
        ("dora", {"use_dora": False}, "use --method lora"),
        ("adamss", {"use_asa": True}, "use_asa for adamss, which masks subspaces"),
        ("road", {"variant": "road_9"}, "does not suit road: Invalid variant road_9"),
    ],
)
def test_wrong_settings_are_named(method, settings, message):
    text = settings if isinstance(settings, str) or settings is None else json.dumps(settings)
    with pytest.raises(ConfigError, match=message):
        method_config(AdapterConfig(method=method, method_config=text))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"r": 0}, "PEFT refuses method lora for this BertForSequenceClassification: `r` should be a positive integer"),
        ("lora", {"target_modules": ["q_proj"]}, "No modules were targeted"),
        ("ln_tuning", None, r"PEFT knows no layers for method ln_tuning in a BertForSequenceClassification.*\[\"LayerNorm\"\]"),
        (
            "vblora",
            {"vector_length": 16, "num_vectors": 20, "save_only_topk_weights": True},
            "trains .*logits.* does not save as it is",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(method, settings, message):
    text = None if settings is None else json.dumps(settings)
    with pytest.raises(ConfigError, match=message):
        attach(tiny_model("bert"), AdapterConfig(method=method, method_config=text), seed=0)


@pytest.mark.parametrize("method", available())
def test_conv1d_layers_are_adapted_or_refused_with_the_reason(method, tmp_path):
    model = tiny_model("gpt2")
    takes = method in TAKE_CONV1D or method in ("ln_tuning", "trainable_tokens")  # which adapt other layers
    config = adapter(method, **({"target_modules": ["ln_1"]} if method == "ln_tuning" else {}))
    if not takes:
        for settings in ({}, {"target_modules": ["c_attn"]}):
            with pytest.raises(ConfigError, match=f"method {method} of PEFT adapts no Conv1D layers, .*GPT2ForSeq.*choose one.*lora"):
                attach(tiny_model("gpt2"), adapter(method, **settings), seed=0)
        return
    attached = attach(model, config, seed=0)
    losses = train(attached)
    assert losses[-1] < losses[0]
    write(tmp_path, attached)
    torch.manual_seed(99)
    expected = logits(attached.model)
    assert torch.equal(logits(folders.load(tiny_model("gpt2"), tmp_path)), expected)


def test_layers_to_name_are_those_that_the_method_can_adapt(monkeypatch):
    model = tiny_model("gpt2")
    monkeypatch.setattr(type(model.config), "model_type", "unheard-of")
    with pytest.raises(ConfigError, match=r'\{"target_modules": \["c_attn"\]\}.* called c_attn, c_proj, c_fc$'):
        attach(model, adapter("lora"), seed=0)
    with pytest.raises(ConfigError, match="method trainable_tokens of PEFT adapts no Conv1D layers"):
        attach(model, adapter("trainable_tokens", target_modules=["c_attn"]), seed=0)


def test_what_deepspeed_and_a_method_do_not_do_together_is_refused():
    check_run(AdapterConfig(method="lora"), 3, "bf16")
    check_run(AdapterConfig(method="deft"), 2, "bf16")
    with pytest.raises(ConfigError, match=r"method deft of PEFT does not train at ZeRO-3: .*zero2\.json"):
        check_run(AdapterConfig(method="deft"), 3, "fp32")
    with pytest.raises(ConfigError, match=r"method adamss of PEFT does not train in bf16: .*zero2_fp32\.json"):
        check_run(AdapterConfig(method="adamss"), 2, "bf16")


def test_what_is_no_parameter_gets_the_runs_precision_and_is_saved_exactly(tmp_path):
    # DeepSpeed casts parameters only, and PEFT multiplies both.
    attached = attach(tiny_model("bert"), adapter("vera"), seed=0, dtype=torch.bfloat16)
    models.cast_parameters(attached.model, torch.bfloat16)
    expected = logits(attached.model)
    assert {tensor.dtype for tensor in attached.kept.values()} == {torch.float32}
    write(tmp_path, attached)
    again = folders.load(tiny_model("bert"), tmp_path, torch.bfloat16)
    models.cast_parameters(again, torch.bfloat16)
    assert torch.equal(logits(again), expected)


def test_a_folder_is_read_again_or_says_what_is_wrong(tmp_path):
    attached = attach(tiny_model("bert"), adapter("lora"), seed=0)
    options = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}
    write(tmp_path, attached, options)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "backbone.json"]
    assert folders.read_backbone(tmp_path) == {
        "base_model": "some/model", "auto_class": "AutoModelForSequenceClassification", "model_options": options,
        "replaced": ["classifier"], "backbone": None,
    }  # fmt: skip
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["task_type"], stored["modules_to_save"], stored["inference_mode"]) == ("SEQ_CLS", ["classifier"], True)
    with pytest.raises(CheckpointError, match="does not fit BertForSequenceClassification"):
        folders.load(tiny_model("bert", hidden_size=64), tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected .*layer\.1"):
        folders.load(tiny_model("bert", num_hidden_layers=1), tmp_path)
    with pytest.raises(CheckpointError, match=r"missing .*layer\.2"):
        folders.load(tiny_model("bert", num_hidden_layers=3), tmp_path)
    (tmp_path / "backbone.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"backbone\.json is damaged: it has no"):
        folders.read_backbone(tmp_path)
    (tmp_path / "backbone.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no backbone\.json"):
        folders.read_backbone(tmp_path)


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_full_disk_leaves_the_old_folder(fails, tmp_path, monkeypatch):
    attached = attach(tiny_model("bert"), adapter("lora"), seed=0)
    write(tmp_path, attached)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls, replace = [], os.replace

    def full_disk(*names):
        calls.append(names)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")
        replace(*names)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, attached)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_another_backbone_is_refused(tmp_path):
    model = tiny_model("bert")
    fingerprint = take_fingerprint(model)
    attached = attach(model, adapter("lora", bias="all"), seed=0)
    head = {"base_model": "some/model", "auto_class": "AutoModelForSequenceClassification", "model_options": {}}
    folders.save(tmp_path, attached, tensors=trained(attached), backbone=fingerprint, **head)
    folders.check_backbone(tiny_model("bert"), tmp_path)
    other = tiny_model("bert")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1.0)
    with pytest.raises(CheckpointError, match=r"was trained on another backbone .*word_embeddings"):
        folders.check_backbone(other, tmp_path)
    folders.check_backbone(other, tmp_path, allow_other_backbone=True)


def test_half_a_result_is_not_saved(tmp_path):
    attached = attach(tiny_model("bert"), adapter("lora"), seed=0)
    tensors = trained(attached)
    first = next(iter(tensors))
    for broken, message in (
        ({name: t for name, t in tensors.items() if name != first}, "lora_A.default.weight is missing"),
        (tensors | {first: torch.zeros(0)}, "is empty"),
        ({name: t for name, t in tensors.items() if "classifier" not in name}, r"classifier\.\* is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            folders.save(tmp_path / "out", attached, tensors=broken, base_model="x", auto_class="AutoModel", model_options={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "(.+)+x"},
        {"exclude_modules": "(.+)+x"},
        {"rank_pattern": {"(.+)+x": 2}},
        {"layers_pattern": ["(.+)+x"], "layers_to_transform": [0]},
        {"modules_to_save": ["(.+)+x"]},
    ],
)
@pytest.mark.timeout(30)
def test_a_folder_whose_expressions_do_not_end_is_refused(settings, tmp_path, monkeypatch):
    write(tmp_path, attach(tiny_model("bert"), adapter("lora"), seed=0), {"num_labels": 3})
    monkeypatch.setattr(placement, "_MATCHING_SECONDS", 0.2)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=rf"{next(iter(settings))} .* takes more than 0\.2 seconds"):
        folders.load(tiny_model("bert"), tmp_path)


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_texts_of_a_saved_decoder_do_not_depend_on_their_batch(method: str, tmp_path: Path) -> None:
    backbone = save_byte_gpt2(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(backbone)

    def model() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(backbone)

    attached = attach(model(), adapter(method), seed=3)
    with torch.no_grad():
        for parameter in trained(attached).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    folders.save(
        tmp_path / "saved", attached, tensors=trained(attached), base_model=str(backbone), auto_class="AutoModelForCausalLM",
        model_options={}, backbone=take_fingerprint(model(), tokenizer),
    )  # fmt: skip
    loaded = folders.load(model(), tmp_path / "saved")
    settings = GenerationConfig(num_beams=3, max_new_tokens=12, eos_token_id="25,108")
    decoder = BeamDecoder(loaded, tokenizer, settings, device=torch.device("cpu"))
    prompts = [np.arange(length) * 7 % 256 for length in (1, 5, 30)]
    texts = decoder.tokens(prompts)
    assert texts == [decoder.tokens([prompt])[0] for prompt in prompts]
    assert texts != BeamDecoder(model().eval(), tokenizer, settings, device=torch.device("cpu")).tokens(prompts)
