"""What the published code can read, and the reasons for what it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adakron import adapter_folder, adapter_io, models
from adakron.config import AdapterConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.models import adapt
from adakron.nn import kronecker_product
from adakron.reference import export_checkpoint, import_checkpoint, reorder_columns, write_checkpoint
from tests.helpers.architectures import tiny_batch, tiny_model
from tests.helpers.published import save_base, save_imported

CLASSIFIER, DECODER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
LABELS: dict[str, Any] = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}


def trained_folder(folder: Path, model_type: str, auto_class: str = CLASSIFIER, **settings: Any) -> tuple[Path, Tensor]:
    """An adapter folder with its backbone beside it, adapters and head moved away from their start; and its logits."""
    heads = settings.pop("heads", None)
    model = tiny_model(model_type, auto_class=auto_class)
    base = save_base(folder / "base", model)
    adapter = AdapterConfig(**({"bottleneck_dim": 8} | settings))
    info = adapt(model, adapter, seed=1, heads=heads)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.2)
        logits = model(**tiny_batch()).logits
    adapter_io.save_adapter(
        folder / "adapter",
        tensors={**trained, **models.adapter_buffers(model, info)},
        adapter=adapter,
        info=info,
        base_model=str(base),
        auto_class=auto_class,
        model_options=LABELS if auto_class == CLASSIFIER else {},
    )
    return folder / "adapter", logits


@pytest.mark.parametrize(
    ("model_type", "auto_class", "settings"),
    [
        ("bert", CLASSIFIER, {}),
        ("roberta", CLASSIFIER, {"factor_order": "b_major", "bottleneck_dim": 24}),
        ("roberta", CLASSIFIER, {"method": "adamix", "experts_in": "down,up", "expert_scores": "random"}),
        ("bert", CLASSIFIER, {"method": "pfeiffer", "activation": "gelu"}),
        ("gpt2", DECODER, {"factor_order": "b_major"}),
        ("gpt2", DECODER, {"method": "madakron_partial", "expert_scores": "random"}),
        ("gpt2", DECODER, {"method": "adamix", "activation": "gelu_tanh", "num_experts": 2}),
    ],
)
def test_what_is_exported_computes_the_same(tmp_path: Path, model_type: str, auto_class: str, settings: dict[str, Any]) -> None:
    folder, logits = trained_folder(tmp_path, model_type, auto_class, **settings)
    write_checkpoint(export_checkpoint(folder).content, tmp_path / "file")
    imported = import_checkpoint(tmp_path / "file", str(tmp_path / "base"))
    with torch.no_grad():
        assert torch.allclose(imported.model(**tiny_batch()).logits, logits, rtol=1e-5, atol=1e-6)
    assert imported.adapter.factor_order == (
        "b_major" if model_type == "gpt2" and imported.adapter.bottleneck == "kronecker" else "a_major"
    )
    # And once more: from here on nothing changes.
    again = save_imported(tmp_path / "again", imported, tmp_path / "base")
    write_checkpoint(export_checkpoint(again).content, tmp_path / "file2")
    assert _same(tmp_path / "file", tmp_path / "file2")


def _same(first: Path, second: Path) -> bool:
    one, two = (torch.load(file, weights_only=True) for file in (first, second))
    one, two = (content.get("model_state_dict", content) for content in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_file_holds_the_trained_values_and_no_more(tmp_path: Path) -> None:
    folder, _ = trained_folder(tmp_path, "bert")
    content = export_checkpoint(folder).content
    saved = adapter_io.read_adapter_tensors(folder)
    up = "bert.encoder.layer.1.output.ExpertSoup.MoA_B.deepspeed_experts.0.weight"
    assert torch.equal(content[up], saved["bert.encoder.layer.1.output.dense.adakron_adapter.up.weight"])
    assert content[up.replace("deepspeed_experts.0.weight", "expert_score_weight")].tolist() == [0.0]
    assert len(content) == 2 * 9 + 2
    # torch.save writes the storage behind a tensor: none may be a view of a larger one.
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in content.values())


@pytest.mark.parametrize(
    ("model_type", "auto_class", "settings", "message"),
    [
        ("bert", CLASSIFIER, {"kron_factor": 2}, "kron_factor is 2, and that code has 4 fixed in it; train with --kron_factor 4"),
        ("bert", CLASSIFIER, {"activation": "relu"}, "activation is relu, and that code has gelu fixed in it"),
        ("bert", CLASSIFIER, {"method": "pfeiffer"}, "activation is relu, and that code has gelu fixed in it"),
        (
            "bert",
            CLASSIFIER,
            {"method": "madakron"},
            r"down_a, down_b have several experts, .* nowhere; average them first .convert.py merge",
        ),
        ("gpt2", DECODER, {"method": "madakron"}, "down_b have several experts, and that code has them only in down_a"),
        ("gpt2", DECODER, {"bottleneck_dim": 16}, "bottleneck_dim is 16, and that code has 8 fixed in it"),
        ("gpt2", DECODER, {"method": "adamix"}, "activation is gelu, and that code has gelu_tanh fixed in it"),
        ("bert", CLASSIFIER, {"target_modules": r".*layer\.0\.output\.dense"}, r"it lacks bert.encoder.layer.1.output.dense"),
        ("bert", CLASSIFIER, {"target_modules": r".*output\.dense"}, r"it has bert.encoder.layer.0.attention.output.dense"),
        ("electra", CLASSIFIER, {}, "every layer of BERT or RoBERTa and nothing else"),
        (
            "bert",
            CLASSIFIER,
            {"heads": ("classifier", "bert.pooler")},
            r"it trained classifier, bert.pooler, and that code trains classifier; t",
        ),
        ("bert", CLASSIFIER, {"method": "head"}, "holds method head, which has no adapters to export"),
        ("bert", "AutoModelForMaskedLM", {}, "was saved for AutoModelForMaskedLM; the published codes train"),
    ],
)
def test_what_the_published_code_cannot_express(
    tmp_path: Path, model_type: str, auto_class: str, settings: dict[str, Any], message: str
) -> None:
    folder, _ = trained_folder(tmp_path, model_type, auto_class, **settings)
    with pytest.raises(ConfigError, match=message):
        export_checkpoint(folder)


def test_all_reasons_at_once_and_the_other_format(tmp_path: Path) -> None:
    folder, _ = trained_folder(tmp_path, "bert", kron_factor=2, activation="silu")
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(folder, form="nlg")
    text = str(caught.value)
    for part in (
        "format nlg is for AutoModelForCausalLM (set --format)",
        "of GPT-2 and nothing else",
        "kron_factor",
        "activation",
        "no head",
    ):
        assert part in text


def test_the_backbone_must_be_there(tmp_path: Path) -> None:
    folder, _ = trained_folder(tmp_path, "gpt2", DECODER)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"does not exist .set --model_name_or_path"):
        export_checkpoint(folder)
    assert export_checkpoint(folder, base=str(tmp_path / "moved")).content


def test_a_damaged_record_of_the_imported_file(tmp_path: Path) -> None:
    folder, _ = trained_folder(tmp_path, "bert")
    config = folder / adapter_folder.CONFIG_FILE
    for record in ('"x"', '{"ddp_prefix": true}', '{"ddp_prefix": true, "output_key": null, "causal_masks": true, "lone_scores": 3}'):
        config.write_text(config.read_text().replace('"extra": {}', f'"extra": {{"reference": {record}}}'))
        with pytest.raises(CheckpointError, match=r"what its adapter_config.json records of the imported file is damaged"):
            export_checkpoint(folder)
        config.write_text(config.read_text().replace(f'"extra": {{"reference": {record}}}', '"extra": {}'))


@pytest.mark.parametrize(("kron_factor", "width"), [(4, 12), (4, 16), (3, 15), (1, 5), (5, 5)])
def test_columns_in_the_other_order_give_the_same_products(kron_factor: int, width: int) -> None:
    up = torch.randn(7, width, dtype=torch.float64)
    a, b = torch.randn(6, kron_factor, dtype=torch.float64), torch.randn(6, width // kron_factor, dtype=torch.float64)
    by_b = reorder_columns(up, kron_factor, "b_major")
    assert torch.allclose(kronecker_product(a, b, "a_major") @ up.T, kronecker_product(a, b, "b_major") @ by_b.T, rtol=1e-14, atol=1e-14)
    assert torch.equal(reorder_columns(by_b, kron_factor, "a_major"), up)
    stack = torch.stack([up, 2 * up])
    assert torch.equal(reorder_columns(stack, kron_factor, "b_major")[1], 2 * by_b)


def test_nothing_is_overwritten_and_no_half_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="exists; name another file, or delete it"):
        write_checkpoint({"x": torch.ones(1)}, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"

    def full_disk(*arguments: Any) -> None:
        Path(arguments[1]).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint({"x": torch.ones(1)}, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
