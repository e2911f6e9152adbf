"""AdaMix's files, whole-model files, and everything that is wrong with a file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adakron import adapter_folder, adapter_io
from adakron.errors import CheckpointError, ConfigError
from adakron.nn import AdaptedLayer
from adakron.reference import import_checkpoint
from tests.helpers.architectures import tiny_model
from tests.helpers.published import assert_same, golden, save_base, save_imported, soup, stored

BERT_HOMES = [f"bert.encoder.layer.{layer}.output" for layer in range(2)]
GPT2_HOMES = [f"transformer.h.{layer}.mlp" for layer in range(2)]
ADAKRON = {"MoA_A1": (32, 3, 1), "MoA_A2": (32, 4, 1), "MoA_B": (12, 32, 1)}


def head(labels: int = 3) -> dict[str, Tensor]:
    return {"classifier.weight": torch.randn(labels, 32), "classifier.bias": torch.randn(labels)}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_base(tmp_path / "bert", tiny_model("bert"))


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return save_base(tmp_path / "gpt2", tiny_model("gpt2", auto_class="AutoModelForCausalLM"))


def write(folder: Path, tensors: Mapping[str, Any], *, name: str = "file.bin") -> Path:
    torch.save(dict(tensors), folder / name)
    return folder / name


def mean(tensors: Mapping[str, Tensor], prefix: str, kind: str) -> Tensor:
    scores = torch.softmax(tensors[f"{prefix}.expert_score_weight"].double(), dim=0)
    parts = [share * tensors[f"{prefix}.deepspeed_experts.{e}.{kind}"].double() for e, share in enumerate(scores)]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize(
    ("experts", "settings"),
    [
        ((4, 4), (4, "down,up")),
        ((4, 1), (4, "down")),
        ((1, 4), (4, "up")),
        ((1, 1), (1, "")),
    ],
)
@pytest.mark.parametrize("kind", ["glue", "nlg"])
def test_adamix(tmp_path: Path, kind: str, experts: tuple[int, int], settings: tuple[int, str], request: pytest.FixtureRequest) -> None:
    base: Path = request.getfixturevalue("bert" if kind == "glue" else "gpt2")
    homes = BERT_HOMES if kind == "glue" else GPT2_HOMES
    tensors = soup(homes, {"MoA_A": (32, 16, experts[0]), "MoA_B": (16, 32, experts[1])}, random_scores=True)
    file = write(tmp_path, tensors | head()) if kind == "glue" else write(tmp_path, {"model_state_dict": tensors})
    imported = import_checkpoint(file, str(base))
    adapter = imported.adapter
    assert (adapter.method, adapter.bottleneck_dim, adapter.num_experts, adapter.experts_in) == ("adamix", 16, *settings)
    assert adapter.activation == ("gelu" if kind == "glue" else "gelu_tanh")
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for site, home in zip(imported.info.sites, homes, strict=True):
        layer = imported.model.get_submodule(site)
        assert isinstance(layer, AdaptedLayer)
        down, up = (f"{home}.ExpertSoup.{module}" for module in ("MoA_A", "MoA_B"))
        z = F.linear(x, mean(tensors, down, "weight"), mean(tensors, down, "bias"))
        z = F.gelu(z, approximate="none" if kind == "glue" else "tanh")
        y = x + F.linear(z, mean(tensors, up, "weight"), mean(tensors, up, "bias"))
        assert (layer.adakron_adapter.double().eval()(x) - y).abs().max() < 1e-6  # the file's float32 scores


def test_the_names_decide_and_not_the_shapes(tmp_path: Path, bert: Path) -> None:
    # At width 16 both factors have four rows.
    tensors = soup(BERT_HOMES, {"MoA_A1": (32, 4, 1), "MoA_A2": (32, 4, 1), "MoA_B": (16, 32, 1)})
    imported = import_checkpoint(write(tmp_path, tensors | head()), str(bert))
    state = imported.model.state_dict()
    for site, home in zip(imported.info.sites, BERT_HOMES, strict=True):
        for module, own in (("MoA_A2", "down_a"), ("MoA_A1", "down_b"), ("MoA_B", "up")):
            stored = tensors[f"{home}.ExpertSoup.{module}.deepspeed_experts.0.weight"]
            assert torch.equal(state[f"{site}.adakron_adapter.{own}.weight"], stored)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (3, None, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (2, None, ["0", "1"]),
        (2, ["bad", "good"], ["bad", "good"]),
        (1, None, None),
    ],
)
def test_labels(tmp_path: Path, bert: Path, labels: int, names: list[str] | None, expected: list[str] | None) -> None:
    imported = import_checkpoint(write(tmp_path, soup(BERT_HOMES, ADAKRON) | head(labels)), str(bert), names)
    options = imported.model_options
    assert options["num_labels"] == labels
    assert list(options["id2label"].values()) == expected if expected else options["problem_type"] == "regression"
    saved = adapter_folder.read_adapter_config(save_imported(tmp_path / "out", imported, bert))
    assert saved.model_options == options and saved.auto_class == "AutoModelForSequenceClassification"


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (3, ["a", "b"], "gives 'a', 'b'; the head in .* needs 3 different names"),
        (2, ["a", "a"], "needs 2 different names"),
        (1, ["a"], "the head in .* has one output, a regression; drop it"),
    ],
)
def test_wrong_label_names(tmp_path: Path, bert: Path, labels: int, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_checkpoint(write(tmp_path, soup(BERT_HOMES, ADAKRON) | head(labels)), str(bert), names)


def test_a_whole_classifier_of_a_training_checkpoint(tmp_path: Path, bert: Path) -> None:
    # checkpoint-*/pytorch_model.bin of the published code: the encoder, the adapters, the head, and a table of positions.
    model = tiny_model("bert")
    whole = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier.")}
    whole |= soup(BERT_HOMES, ADAKRON) | head()
    whole["bert.embeddings.position_ids"] = torch.arange(model.config.max_position_embeddings)[None]
    assert len(import_checkpoint(write(tmp_path, whole), str(bert)).info.sites) == 2
    whole["bert.embeddings.position_ids"] = whole["bert.embeddings.position_ids"].flip(1)
    whole["bert.pooler.dense.bias"] = whole["bert.pooler.dense.bias"] + 1
    with pytest.raises(CheckpointError, match=r"2 of \d+ frozen tensors differ .*bert.pooler.dense.bias, bert.embeddings.position_ids"):
        import_checkpoint(write(tmp_path, whole), str(bert))


def test_a_step_file_with_adapters_only(tmp_path: Path, gpt2: Path) -> None:
    tensors = soup(GPT2_HOMES, {"MoA_A": (32, 4, 3), "MoA_A1": (32, 2, 1), "MoA_B": (8, 32, 1)}, random_scores=True)
    file = write(tmp_path, {"model_state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, name="model.500.pt")
    imported = import_checkpoint(file, str(gpt2))
    scores = imported.model.state_dict()["transformer.h.1.mlp.c_proj.adakron_adapter.down_a.expert_scores"]
    assert torch.equal(scores, tensors["transformer.h.1.mlp.ExpertSoup.MoA_A.expert_score_weight"])


def test_half_precision_is_read(tmp_path: Path, gpt2: Path) -> None:
    whole = tiny_model("gpt2", auto_class="AutoModelForCausalLM").state_dict()
    whole |= soup(GPT2_HOMES, {"MoA_A": (32, 4, 1), "MoA_A1": (32, 2, 1), "MoA_B": (8, 32, 1)})
    halves = {name: tensor.half() for name, tensor in whole.items()}
    imported = import_checkpoint(write(tmp_path, {"model_state_dict": halves}), str(gpt2))
    weight = imported.model.state_dict()["transformer.h.0.mlp.c_proj.adakron_adapter.up.weight"]
    assert torch.equal(weight, halves["transformer.h.0.mlp.ExpertSoup.MoA_B.deepspeed_experts.0.weight"].float())


FIRST = "bert.encoder.layer.0.output.ExpertSoup"
CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda t: t.pop(f"{FIRST}.MoA_A1.deepspeed_experts.0.bias"), rf"1 key is missing: {FIRST}.MoA_A1.deepspeed_experts.0.bias"),
    (lambda t: t.pop(f"{FIRST}.MoA_B.expert_score_weight"), rf"1 key is missing: {FIRST}.MoA_B.expert_score_weight"),
    (lambda t: t.pop("classifier.bias"), "1 key is missing: classifier.bias"),
    (lambda t: t.pop("classifier.weight"), "holds no head"),
    (lambda t: t.update({"classifier.scale": torch.ones(3)}), "1 key is unknown: classifier.scale"),
    (lambda t: t.update({f"{FIRST}.MoA_C.expert_score_weight": torch.ones(1)}), rf"1 key is unknown: {FIRST}.MoA_C.expert_score_weight"),
    (
        lambda t: t.update({f"{FIRST}.MoA_A1.deepspeed_experts.7.bias": torch.ones(3)}),
        rf"(?s)missing: .*1.bias.*1 key is unknown: {FIRST}.MoA_A1.deepspeed_experts.7.bias",
    ),
    (
        lambda t: t.update({f"{FIRST}.MoA_B.expert_score_weight": torch.ones(2)}),
        r"another shape .*MoA_B.expert_score_weight \(2,\) for \(1,\)",
    ),
    (
        lambda t: t.update({f"{FIRST}.MoA_A1.deepspeed_experts.0.weight": torch.ones(3, 31)}),
        r"another shape than the model's: .*MoA_A1.deepspeed_experts.0.weight \(3, 31\) for \(3, 32\)",
    ),
    (
        lambda t: t.update({f"{FIRST}.MoA_B.deepspeed_experts.0.bias": torch.ones(32, dtype=torch.int64)}),
        r"1 key is not of floating-point numbers: .*MoA_B.deepspeed_experts.0.bias",
    ),
    (
        lambda t: [t.pop(key) for key in [*t] if "layer.1." in key],
        r"9 keys are missing: bert.encoder.layer.1.output.ExpertSoup.MoA_A1.* and 1 more",
    ),
    (
        lambda t: t.update({key.replace("layer.1", "layer.2"): tensor for key, tensor in t.items() if "layer.1" in key}),
        r"9 keys are unknown: bert.encoder.layer.2",
    ),
    (lambda t: [t.pop(key) for key in [*t] if "MoA_B" in key], r"consist of MoA_A1, MoA_A2, which no published code writes"),
    (lambda t: [t.pop(key) for key in [*t] if "ExpertSoup" in key], r"holds no adapter.*its 2 keys are classifier.weight"),
    (lambda t: t["classifier.bias"].fill_(torch.inf), "tensors that no training leaves: classifier.bias has values that are not finite"),
    (lambda t: t.update({"classifier.bias": torch.ones(3).to_sparse()}), "classifier.bias is no ordinary tensor"),
    (lambda t: t.update({"epoch": 3}), r"1 entries that are no tensors by name: 'epoch' \(int\)"),
    (lambda t: t.update({"model_state_dict": {}}), "beside 'model_state_dict', which no published code writes"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=range(len(CHANGES)))
def test_every_key_is_accounted_for(tmp_path: Path, bert: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    tensors: dict[str, Any] = soup(BERT_HOMES, ADAKRON) | head()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(write(tmp_path, tensors), str(bert))


def test_unequal_numbers_of_experts(tmp_path: Path, bert: Path) -> None:
    tensors = soup(BERT_HOMES, {"MoA_A": (32, 16, 4), "MoA_B": (16, 32, 2)})
    with pytest.raises(CheckpointError, match=r"unequal numbers of experts \(MoA_A 4, MoA_B 2\)"):
        import_checkpoint(write(tmp_path, tensors | head()), str(bert))


def test_a_width_that_is_no_product(tmp_path: Path, bert: Path) -> None:
    tensors = soup(BERT_HOMES, {"MoA_A1": (32, 3, 1), "MoA_A2": (32, 4, 1), "MoA_B": (13, 32, 1)})
    with pytest.raises(CheckpointError, match=r"bottleneck_dim \(13\) must be divisible by kron_factor \(4\)"):
        import_checkpoint(write(tmp_path, tensors | head()), str(bert))


def test_empty_step_files(tmp_path: Path, gpt2: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter.*it is empty"):
        import_checkpoint(write(tmp_path, {"model_state_dict": {}}), str(gpt2))


def test_the_wrong_backbone(tmp_path: Path, bert: Path, gpt2: Path) -> None:
    glue = write(tmp_path, soup(BERT_HOMES, ADAKRON) | head())
    roberta = save_base(tmp_path / "roberta", tiny_model("roberta"))
    with pytest.raises(CheckpointError, match=r"adapters of a bert model, .* is a roberta .set --model_name_or_path"):
        import_checkpoint(glue, str(roberta))
    wide = save_base(tmp_path / "wide", tiny_model("bert", hidden_size=64))
    with pytest.raises(CheckpointError, match=r"\(3, 32\) for \(3, 64\)"):
        import_checkpoint(glue, str(wide))
    with pytest.raises(ConfigError, match=r"has no config.json"):
        import_checkpoint(glue, str(tmp_path))


def test_a_changed_gpt2_is_refused_tensor_by_tensor(tmp_path: Path) -> None:
    base, file, _ = golden("gpt2_tiny_e4")
    tensors = stored(file)
    tensors["transformer.h.1.attn.c_attn.weight"][3, 5] += 1e-6
    with pytest.raises(
        CheckpointError, match=r"1 of 29 frozen tensors differ from those of .*: transformer.h.1.attn.c_attn.weight; an adap"
    ):
        import_checkpoint(write(tmp_path, {"model_state_dict": tensors}), str(base))
    tensors = stored(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"frozen tensors differ .*: lm_head.weight"):
        import_checkpoint(write(tmp_path, {"model_state_dict": tensors}), str(base))
    tensors = stored(file)
    del tensors["transformer.ln_f.bias"]
    with pytest.raises(CheckpointError, match=r"1 key is missing: transformer.ln_f.bias"):
        import_checkpoint(write(tmp_path, {"model_state_dict": tensors}), str(base))


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, ("payload-ran",)


def test_damaged_and_hostile_files(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path, soup(BERT_HOMES, ADAKRON) | head())
    with pytest.raises(CheckpointError, match=r"names [a-z]+.mkdir, and tensors by name is all that is read; nothing in it was run"):
        import_checkpoint(write(tmp_path, {"x": Payload()}, name="hostile.bin"), str(bert))
    assert not (tmp_path / "payload-ran").exists()
    content = good.read_bytes()
    for damaged in (content[: len(content) // 2], content[:10], b"", b"not a checkpoint at all\n"):
        (tmp_path / "damaged.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"cannot read .*damaged.bin"):
            import_checkpoint(tmp_path / "damaged.bin", str(bert))
    place = content.index(torch.load(good, weights_only=True)["classifier.weight"].numpy().tobytes())
    (tmp_path / "damaged.bin").write_bytes(content[: place + 2] + bytes([content[place + 2] ^ 64]) + content[place + 3 :])
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of its entry .* is wrong"):
        import_checkpoint(tmp_path / "damaged.bin", str(bert))
    for name in ("absent.bin", "bert"):
        with pytest.raises(CheckpointError, match="is no file"):
            import_checkpoint(tmp_path / name, str(bert))
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match="holds a list"):
        import_checkpoint(tmp_path / "list.bin", str(bert))


def test_values_arrive_untouched(tmp_path: Path, bert: Path) -> None:
    tensors = soup(BERT_HOMES, ADAKRON) | head()
    imported = import_checkpoint(write(tmp_path, tensors), str(bert))
    saved = adapter_io.read_adapter_tensors(save_imported(tmp_path / "out", imported, bert))
    names = {"MoA_A1": "down_b", "MoA_A2": "down_a", "MoA_B": "up"}
    expected = {
        f"{home}.dense.adakron_adapter.{names[module]}.{kind}": tensors[f"{home}.ExpertSoup.{module}.deepspeed_experts.0.{kind}"]
        for home in BERT_HOMES
        for module in ADAKRON
        for kind in ("weight", "bias")
    }
    assert_same(saved, expected | {name: tensor for name, tensor in tensors.items() if name.startswith("classifier.")})
