"""The contract between our adapters and PEFT; `test_versions.py` runs this module with every supported minor release."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments, XLNetConfig

import adakron.peft
from adakron import adapter_folder, adapter_io, models
from adakron.config import AdapterConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import take_fingerprint
from adakron.peft import AdaKronConfig, AdaKronLayer
from adakron.peft.registration import register
from tests.helpers.architectures import SIZES, tiny_batch, tiny_model
from tests.helpers.launch import ROOT

OPTIONS: dict[str, Any] = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
SMALL: dict[str, Any] = {"bottleneck_dim": 8, "kron_factor": 2, "init_std": 0.3}
MIXTURE: dict[str, Any] = {"method": "madakron", "num_experts": 3, "expert_scores": "random"}
BATCH = tiny_batch()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT: what adapters name as their backbone."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("bert").save_pretrained(folder)
    return folder


def write(folder: Path, base: Path, model_type: str = "bert", seed: int = 9, **settings: Any) -> Tensor:
    """A folder of ours with values that no fresh model has; the logits of its model."""
    config = AdapterConfig(**(SMALL | settings))
    model = tiny_model(model_type)
    fingerprint = take_fingerprint(model)
    info = models.adapt(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator))
    adapter_io.save_adapter(
        folder, tensors={**tensors, **models.adapter_buffers(model, info)}, adapter=config, info=info, base_model=str(base),
        auto_class="AutoModelForSequenceClassification", model_options=OPTIONS, backbone=fingerprint,
    )  # fmt: skip
    return logits(model.eval())


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**BATCH, **options).logits
    return found


def config(**settings: Any) -> AdaKronConfig:
    return AdaKronConfig(**({"task_type": "SEQ_CLS"} | SMALL | settings))


@pytest.mark.parametrize(
    "settings",
    [{}, MIXTURE, MIXTURE | {"tune_expert_scores": True}, {"method": "pfeiffer"}, {"factor_order": "b_major", "activation": "relu"}],
    ids=["adakron", "mixture", "tuned_scores", "plain", "b_major"],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_our_folder_loads_in_peft_with_the_same_numbers(settings, low_cpu_mem_usage, base, tmp_path):
    expected = write(tmp_path, base, **settings)
    before = logits(tiny_model("bert"))
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model.eval()), expected) and not torch.equal(expected, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model_type", SIZES)
def test_every_architecture_and_both_ways(model_type, base, tmp_path):
    expected = write(tmp_path / "ours", base, model_type, **MIXTURE)
    tiny_model(model_type).save_pretrained(tmp_path / "base")  # PEFT compares vocabularies when it saves
    model = PeftModel.from_pretrained(tiny_model(model_type), tmp_path / "ours")
    assert torch.equal(logits(model.eval()), expected)
    assert take_fingerprint(model.get_base_model()) == take_fingerprint(tiny_model(model_type))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "theirs")
    again = tiny_model(model_type)
    adapter_io.load_into(again, tmp_path / "theirs")
    assert torch.equal(logits(again.eval()), expected)


def test_a_setting_that_went_to_the_run_is_ignored(base, tmp_path):
    expected = write(tmp_path, base)
    edit(tmp_path, merge_experts=False)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['merge_experts'\] for class AdaKronConfig, these are ignored"):
        model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    assert torch.equal(logits(model.eval()), expected)


def test_nothing_of_a_folder_is_lost_in_peft(base, tmp_path):
    write(tmp_path / "ours", base, layers=None, **MIXTURE)
    PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    before, after = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert {name: after[name] for name in before} == before


def test_the_configuration_has_a_field_for_every_setting(base, tmp_path):
    write(tmp_path, base)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    known = AdaKronConfig.__dataclass_fields__
    assert not [name for name in stored if name not in known]
    assert not [name for name in AdapterConfig.__dataclass_fields__ if name not in known]
    assert {
        name: getattr(AdaKronConfig(), name) for name in stored if name in AdapterConfig.__dataclass_fields__ and name != "target_modules"
    } == {name: value for name, value in AdapterConfig().resolved().to_dict().items() if name != "target_modules"}


def test_a_new_adapter_starts_as_ours_with_the_same_seed(base):
    ours, theirs = tiny_model("bert"), tiny_model("bert")
    models.adapt(ours, AdapterConfig(**(SMALL | MIXTURE)), seed=5)
    model = get_peft_model(theirs, config(seed=5, **MIXTURE))
    assert torch.equal(logits(model.eval()), logits(ours.eval()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    sizes = sum(model.get_parameter(name).numel() for name in trained)
    assert sizes == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert not any("expert_scores" in name for name in trained)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(1)
    first = logits(get_peft_model(tiny_model("bert"), config()).eval())
    torch.manual_seed(1)
    assert torch.equal(logits(get_peft_model(tiny_model("bert"), config()).eval()), first)
    assert not torch.equal(logits(get_peft_model(tiny_model("bert"), config()).eval()), first)


def test_what_transformers_trainer_trains_loads_with_our_loader(base, tmp_path):
    model = get_peft_model(type(tiny_model("bert")).from_pretrained(base), config(seed=1, **MIXTURE))
    rows = [{name: value[row] for name, value in BATCH.items()} | {"labels": torch.tensor(row % 3)} for row in range(3)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, save_strategy="no", report_to=[],
        disable_tqdm=True, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}, use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "saved")
    fresh = tiny_model("bert")
    info = adapter_io.load_into(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh.eval()), expected)
    assert info.head_modules == ("classifier",)
    saved = adapter_folder.read_adapter_config(tmp_path / "saved")
    assert (saved.base_model, saved.auto_class) == (str(base), "AutoModelForSequenceClassification")
    assert saved.model_options["num_labels"] == 3


def test_targets_chosen_in_peft_are_found_again_by_our_loader(base, tmp_path):
    # Twenty and more: PEFT then keeps endings of names only.
    deep = {"num_hidden_layers": 21}
    wide = tiny_model("bert", **deep)
    wide.save_pretrained(tmp_path / "base")
    for number, targets in enumerate([["attention.output.dense", "layer.3.output.dense"], r".*layer\.\d+\.output\.dense", None]):
        folder = tmp_path / str(number)
        model = get_peft_model(type(wide).from_pretrained(tmp_path / "base"), config(seed=3, target_modules=targets))
        model.save_pretrained(folder)
        fresh = tiny_model("bert", **deep)
        info = adapter_io.load_into(fresh, folder)
        assert torch.equal(logits(fresh.eval()), logits(model.eval()))
        assert len(info.sites) == [22, 21, 21][number]
        again = PeftModel.from_pretrained(tiny_model("bert", **deep), folder)
        assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_placements_of_ours_are_taken_and_kept(base, tmp_path):
    places = {"position": "both", "layers": "1", "exclude_modules": r".*layer\.1\.attention.*"}
    model = get_peft_model(type(tiny_model("bert")).from_pretrained(base), config(seed=3, **places))
    assert model.targeted_module_names == ["bert.encoder.layer.1.output.dense"]
    model.save_pretrained(tmp_path)
    saved = adapter_folder.read_adapter_config(tmp_path).adapter
    assert {name: getattr(saved, name) for name in places} == places
    fresh = tiny_model("bert")
    assert adapter_io.load_into(fresh, tmp_path).sites == ("bert.encoder.layer.1.output.dense",)
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))


def test_several_adapters_switch_disable_and_delete(base, tmp_path):
    plain = logits(tiny_model("bert"))
    one, two = write(tmp_path / "one", base, seed=1), write(tmp_path / "two", base, seed=2, bottleneck_dim=12, **MIXTURE)
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "one", adapter_name="one").eval()
    model.load_adapter(tmp_path / "two", adapter_name="two")
    assert torch.equal(logits(model.eval()), one)
    model.set_adapter("two")
    assert torch.equal(logits(model), two)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), two)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)
    assert not any("two" in name for name in model.state_dict())
    assert model.unload() is model.get_base_model()
    assert not any(isinstance(module, AdaKronLayer) for module in model.modules())


def test_two_cannot_be_active_together(base, tmp_path):
    write(tmp_path, base)
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path, adapter_name="one")
    model.load_adapter(tmp_path, adapter_name="two")
    with pytest.raises(ValueError, match=r"multiple|Only one|cannot be active together"):
        model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ConfigError, match="one, two cannot be active together"):
        model.get_submodule("base_model.model.bert.encoder.layer.0.output.dense").set_adapter(["one", "two"])


@pytest.mark.parametrize("model_type", ["bert", "roberta"])  # a head that is one layer, and one that is not
def test_every_row_gets_the_adapter_and_head_that_it_names(model_type, base, tmp_path):
    plain = logits(tiny_model(model_type))
    one, two = write(tmp_path / "one", base, model_type, seed=1), write(tmp_path / "two", base, model_type, seed=2, **MIXTURE)
    model = PeftModel.from_pretrained(tiny_model(model_type), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    model.eval()
    for names in (["one", "two", "__base__"], ["two", "two", "one"], ["__base__", "__base__", "two"]):
        expected = torch.stack([{"one": one, "two": two, "__base__": plain}[name][row] for row, name in enumerate(names)])
        assert torch.allclose(logits(model, adapter_names=names), expected, atol=1e-5), names
    assert torch.equal(logits(model), one)
    with model.disable_adapter():
        assert torch.equal(logits(model, adapter_names=["one", "two", "one"]), plain)
    with pytest.raises(ConfigError, match="three, which are not loaded; the loaded ones are one, two"):
        logits(model, adapter_names=["one", "three", "one"])
    with pytest.raises(ConfigError, match="2 names, but the batch has 3 rows"):
        logits(model, adapter_names=["one", "two"])
    with pytest.raises(ConfigError, match="in evaluation"):
        logits(model.train(), adapter_names=["one", "two", "one"])


def test_beams_belong_to_the_adapter_of_their_row(tmp_path):
    decoder: Any = tiny_model("gpt2", auto_class="AutoModelForCausalLM")
    model: Any = get_peft_model(decoder, config(task_type="CAUSAL_LM", seed=1, init_std=5.0))
    model.add_adapter("other", config(task_type="CAUSAL_LM", seed=2, init_std=5.0))
    model.eval()
    ids = BATCH["input_ids"][:2, :5]
    options = {"max_new_tokens": 5, "num_beams": 2, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model.generate(input_ids=ids, **options)
    mixed = model.generate(input_ids=ids, adapter_names=["other", "default"], **options)
    assert torch.equal(mixed, torch.stack([alone["other"][0], alone["default"][1]]))
    assert not torch.equal(alone["other"], alone["default"])


def test_merging_is_refused_with_the_reason(base, tmp_path):
    expected = write(tmp_path, base)
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConfigError, match="cannot be merged: their output is not linear"):
            merge()
    assert torch.equal(logits(model), expected)


def test_transformers_own_loading_switching_and_saving(base, tmp_path):
    plain = logits(tiny_model("bert"))
    one, two = write(tmp_path / "one", base, seed=1), write(tmp_path / "two", base, seed=2, **MIXTURE)
    model: Any = tiny_model("bert")
    model.load_adapter(str(tmp_path / "one"), adapter_name="one")
    assert torch.equal(logits(model.eval()), one)
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    model.set_adapter("two")
    assert torch.equal(logits(model.eval()), two)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    with pytest.raises(ConfigError, match="needs a PeftModel"):
        logits(model, adapter_names=["one", "two", "one"])
    model.disable_adapters()
    assert torch.equal(logits(model), plain)


def test_an_adapter_added_in_transformers_saves_for_our_loader(base, tmp_path):
    model: Any = type(tiny_model("bert")).from_pretrained(base)
    model.add_adapter(AdaKronConfig(seed=4, **(SMALL | MIXTURE)))
    model.save_pretrained(tmp_path)
    fresh = tiny_model("bert")
    info = adapter_io.load_into(fresh, tmp_path)
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))
    assert info.head_modules == ("classifier",)


def test_half_precision_backbones(base, tmp_path):
    write(tmp_path, base)
    ours = tiny_model("bert").to(torch.bfloat16)
    adapter_io.load_into(ours, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model("bert").to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(theirs.eval()), logits(ours.eval()))
    wide = PeftModel.from_pretrained(tiny_model("bert").to(torch.bfloat16), tmp_path)  # PEFT's default: adapters in float32
    assert logits(wide.eval()).dtype == torch.bfloat16
    assert torch.allclose(logits(wide), logits(ours), atol=0.5, rtol=0.1)


@pytest.mark.parametrize("method", ["bitfit", "head", "full"])
def test_folders_without_adapters_are_refused(method, base, tmp_path):
    write(tmp_path, base, method=method)
    with pytest.raises(ConfigError, match=f"method {method} trains parameters of the model itself.*load_adapter"):
        PeftModel.from_pretrained(tiny_model("bert"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_dim": 9}, r"bottleneck_dim \(9\) must be divisible by kron_factor \(2\)"),
        ({"target_modules": ["dense", "fc7"]}, "target_modules names fc7, which BertForSequenceClassification does not have"),
        ({"target_modules": "fc7"}, "matches no module of BertForSequenceClassification"),
        ({"target_modules": ["LayerNorm"]}, "LayerNorm is not a linear layer"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, which BertForSequenceClassification does not have"),
        ({"format_version": 99}, "format_version is 99, this release reads 1 to"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny_model("bert"), config(**settings))


def test_a_backbone_of_another_depth_is_refused(base, tmp_path):
    write(tmp_path, base)
    shallow = {"num_hidden_layers": 1}
    with pytest.raises(ConfigError, match=r"another backbone .*layers: saved 2, here 1"):
        PeftModel.from_pretrained(tiny_model("bert", **shallow), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backbone": None}))
    with pytest.raises(ConfigError, match=r"target_modules names bert\.encoder\.layer\.1\.output\.dense"):
        PeftModel.from_pretrained(tiny_model("bert", **shallow), tmp_path)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def other_bert() -> Any:
    other: Any = tiny_model("bert")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1.0)
    return other


@pytest.mark.parametrize("first_has_fingerprint", [True, False])
def test_another_backbone_is_refused_also_beside_another_adapter(first_has_fingerprint, base, tmp_path):
    write(tmp_path / "one", base)
    write(tmp_path / "two", base)
    with pytest.raises(ConfigError, match=r"trained on another backbone .*word_embeddings"):
        PeftModel.from_pretrained(other_bert(), tmp_path / "one")
    edit(tmp_path / "two", backbone=take_fingerprint(other_bert()).to_dict())
    if not first_has_fingerprint:
        edit(tmp_path / "one", backbone=None)
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "one")
    with pytest.raises(ConfigError, match=r"trained on another backbone .*word_embeddings"):
        model.load_adapter(tmp_path / "two", adapter_name="two")


@pytest.mark.parametrize("heads", ["classifier", "classifier,bert.embeddings,bert.encoder.layer.1.output.LayerNorm"])
def test_a_second_adapter_is_compared_within_the_precision_of_its_training(heads, base, tmp_path):
    one, two = write(tmp_path / "one", base, head_modules=heads), write(tmp_path / "two", base, seed=2)
    edit(tmp_path / "two", backbone=take_fingerprint(tiny_model("bert").to(torch.bfloat16)).to_dict())
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "one", adapter_name="one").eval()
    model.load_adapter(tmp_path / "two", adapter_name="two")
    for name, expected in (("one", one), ("two", two)):
        model.set_adapter(name)
        assert torch.equal(logits(model.eval()), expected)


def test_what_peft_trains_carries_a_fingerprint(base, tmp_path):
    settings = config(seed=1)
    for make in (lambda: other_bert(), lambda: tiny_model("bert")):  # the same settings twice
        model = get_peft_model(make(), settings)
        model.add_adapter("second", config(seed=2))
    for name in ("default", "second"):
        model.peft_config[name].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert adapter_folder.read_adapter_config(folder).backbone == take_fingerprint(tiny_model("bert"))
        adapter_io.load_into(tiny_model("bert"), folder)
        with pytest.raises(CheckpointError, match=r"trained on another backbone .*word_embeddings"):
            adapter_io.load_into(other_bert(), folder)


def test_a_fingerprint_is_not_made_up(base, tmp_path):
    write(tmp_path / "ours", base)
    edit(tmp_path / "ours", backbone=None)
    PeftModel.from_pretrained(other_bert(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert adapter_folder.read_adapter_config(tmp_path / "theirs").backbone is None
    with torch.device("meta"):
        model = tiny_model("bert")
    assert get_peft_model(model, config()).peft_config["default"].backbone is None


def test_rows_of_an_unknown_architecture_are_not_guessed() -> None:
    # XLNet's layers see (tokens, texts, width); with as many texts as tokens nothing else shows it.
    model = get_peft_model(
        AutoModelForSequenceClassification.from_config(
            XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=2, d_inner=64, num_labels=3, pad_token_id=0)
        ),
        config(target_modules=r".*ff\.layer_2", modules_to_save=["logits_proj"]),
    ).eval()  # fmt: skip
    ids = torch.arange(2, 18).reshape(4, 4)
    with pytest.raises(ConfigError, match="cannot be told apart"):
        model(input_ids=ids, adapter_names=["default", "__base__"] * 2)
    with pytest.raises(ConfigError, match="2 names, but the batch has 5 rows"):
        model(input_ids=torch.arange(2, 12).reshape(2, 5), adapter_names=["default", "__base__"])


def test_adapter_names_that_files_cannot_keep_are_refused():
    with pytest.raises(ConfigError, match="'up' is the name of a projection"):
        get_peft_model(tiny_model("bert"), config(), adapter_name="up")


def test_a_model_that_we_adapted_is_not_adapted_again():
    model = tiny_model("bert")
    models.adapt(model, AdapterConfig(**SMALL), seed=0)
    with pytest.raises(ConfigError, match="adapters that PEFT did not make"):
        get_peft_model(model, config())


def test_folders_of_other_methods_are_left_to_peft(base, tmp_path):
    get_peft_model(type(tiny_model("bert")).from_pretrained(base), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="load other adapters with PEFT"):
        adapter_io.load_into(tiny_model("bert"), tmp_path)


def test_registering_again_changes_nothing():
    members = list(PeftType)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ADAKRON]  # type: ignore[attr-defined]
    register(AdaKronConfig, adakron.peft.AdaKronModel)
    assert list(PeftType) == members and members.count("ADAKRON") == 1
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("ADAKRON")] is tuner is adakron.peft.AdaKronModel
    assert (PeftType["ADAKRON"].value, PeftType["ADAKRON"].name, "ADAKRON" in PeftType.__members__) == ("ADAKRON", "ADAKRON", True)
    assert isinstance(PeftConfig.from_peft_type(peft_type="ADAKRON", task_type="SEQ_CLS"), AdaKronConfig)


def test_a_method_of_that_name_in_peft_is_reported(monkeypatch):
    class Theirs:
        __module__ = "peft.tuners.adakron"

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType("ADAKRON"), Theirs)
    with pytest.raises(ConfigError, match=r"PEFT has a method ADAKRON already, peft\.tuners\.adakron"):
        register(AdaKronConfig, adakron.peft.AdaKronModel)


def test_peft_stays_out_of_the_rest():
    code = "import sys, adakron, adakron.models, adakron.adapter_io, adakron.trainer; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_parameter_of_every_adapter_is_reached_by_its_gradient():
    model: PreTrainedModel = get_peft_model(tiny_model("bert"), config(seed=1, **MIXTURE))
    model.train()
    model(**BATCH, labels=torch.tensor([0, 1, 2])).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
