import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adakron.adapter_io import load_into, save_adapter
from adakron.backbone import NewParameters
from adakron.bank import AdapterBank
from adakron.config import AdapterConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import take_fingerprint
from adakron.models import adapt, cast_parameters, route_experts
from tests.helpers.architectures import SIZES, tiny_batch, tiny_model

POOLER = NewParameters(("bert.pooler.dense.bias", "bert.pooler.dense.weight"))


def labels(count: int) -> dict[str, Any]:
    names = {index: f"class {index}" for index in range(count)}
    return {"num_labels": count, "id2label": names, "label2id": {name: index for index, name in names.items()}}


def save(
    folder: Path,
    options: Mapping[str, Any],
    *,
    model_type: str = "bert",
    seed: int = 0,
    auto_class: str = "AutoModelForSequenceClassification",
    new_parameters: NewParameters = NewParameters(),  # noqa: B008, an immutable value
    **adapter: Any,
) -> Path:
    """An adapter folder whose adapters and head are far from the identity and from every other folder's."""
    model = backbone(model_type, options, auto_class)
    fingerprint = take_fingerprint(model)
    config = AdapterConfig(**({"bottleneck_dim": 8, "init_std": 0.3} | adapter))
    info = adapt(model, config, seed=seed, new_parameters=new_parameters)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: value for name, value in model.named_parameters() if value.requires_grad}
    tensors |= {name: value for name, value in model.named_buffers() if name.endswith("expert_scores")}
    with torch.no_grad():
        for value in tensors.values():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    save_adapter(
        folder, tensors=tensors, adapter=config, info=info, base_model="some/model", auto_class=auto_class, model_options=options,
        backbone=fingerprint,
    )  # fmt: skip
    return folder


def backbone(
    model_type: str = "bert", options: Mapping[str, Any] | None = None, auto_class: str = "AutoModelForSequenceClassification"
) -> PreTrainedModel:
    """The one backbone of a test, whatever its head: weights that have been trained do not depend on the head's size."""
    model = tiny_model(model_type, auto_class=auto_class, **(options or {}))
    plain = tiny_model(model_type, auto_class="AutoModel")
    model.base_model.load_state_dict(plain.state_dict(), strict=False)
    return model


def alone(folder: Path, options: Mapping[str, Any], model_type: str = "bert", **batch: Tensor) -> Tensor:
    """The logits of a folder in a model of its own."""
    model = backbone(model_type, options)
    load_into(model, folder)
    with torch.no_grad():
        return model(**(batch or tiny_batch())).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Two classes with mixtures of experts; three with another bottleneck, one layer and a trained pooler; a regression."""
    root = tmp_path_factory.mktemp("adapters")
    two, three, number = labels(2), labels(3), {"num_labels": 1, "problem_type": "regression"}
    save(root / "two", two, seed=1, method="madakron", expert_scores="random")
    save(
        root / "three", three, seed=2, new_parameters=POOLER, bottleneck_dim=12, kron_factor=3,
        target_modules=r"bert\.encoder\.layer\.1\.(output|attention\.output)\.dense",
    )  # fmt: skip
    save(root / "number", number, seed=3, method="pfeiffer")
    return {"two": (root / "two", two), "three": (root / "three", three), "number": (root / "number", number)}


def filled(folders: dict[str, tuple[Path, dict[str, Any]]]) -> AdapterBank:
    bank = AdapterBank(backbone())
    for name, (folder, _) in folders.items():
        bank.add(name, folder)
    return bank


def test_switching_equals_each_by_itself_and_disabling_the_backbone(folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    bank = filled(folders)
    assert bank.names == ("two", "three", "number") and bank.active is None
    plain = backbone()(**tiny_batch()).logits
    assert torch.equal(bank.model(**tiny_batch()).logits, plain)
    outputs = []
    for name, (folder, options) in folders.items():
        bank.use(name)
        assert bank.active == name
        outputs.append(bank.model(**tiny_batch()).logits)
        assert torch.equal(outputs[-1], alone(folder, options))
        assert bank.settings(name).model_options == options
    assert [output.shape[1] for output in outputs] == [2, 3, 1]
    bank.disable()
    assert torch.equal(bank.model(**tiny_batch()).logits, plain)
    assert not any(parameter.requires_grad for name, parameter in bank.model.named_parameters() if ".choices." in name)


def test_mixed_rows_equal_the_rows_of_single_runs(folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    bank = filled(folders)
    bank.use("two")
    batch = {name: torch.cat([value, value.flip(0), value]) for name, value in tiny_batch().items()}
    single = {name: alone(folder, options, **batch) for name, (folder, options) in folders.items()}
    for names in (
        ["two", "three", "number", "three", "two", "two", "number", "number", "three"],
        ["number", "two"] * 4 + ["number"],
        ["three"] * 8 + ["two"],
    ):
        rows = bank(names, **batch)
        assert [row.shape for row in rows] == [single[name][0].shape for name in names]
        for index, (name, row) in enumerate(zip(names, rows, strict=True)):
            torch.testing.assert_close(row, single[name][index], rtol=1e-5, atol=1e-6)
            others = [other for other in single if other != name and single[other].shape == single[name].shape]
            assert not any(torch.allclose(row, single[other][index], atol=1e-3) for other in others)
    # One adapter for all rows: the same numbers, bit for bit. And what was in use still is.
    assert torch.equal(torch.stack(bank(["three"] * 9, **batch)), single["three"])
    assert bank.active == "two" and torch.equal(bank.model(**batch).logits, single["two"])


@pytest.mark.parametrize("level", [0, 1])
def test_random_experts_are_drawn_as_by_a_run_itself(level: int, tmp_path: Path) -> None:
    """From (seed, batch, call) of each adapter, and nothing else."""
    for seed, options in ((1, labels(2)), (2, labels(3))):
        save(tmp_path / str(seed), options, seed=seed, method="madakron", num_experts=8, inference_level=level)
    bank = AdapterBank(backbone())
    for name in ("1", "2"):
        bank.add(name, tmp_path / name, seed=int(name) + 40)
    lone = backbone(options=labels(3))
    load_into(lone, tmp_path / "2")
    router = route_experts(lone, 42)
    assert router is not None

    def mixed(index: int, names: str, batch: dict[str, Tensor]) -> list[Tensor]:
        torch.seed()  # the global state must not matter
        bank.evaluation_batch(index)
        return bank(list(names), **batch)

    with torch.no_grad():
        for index in (3, 4):
            router.evaluation_batch(index)
            assert torch.equal(torch.stack(mixed(index, "222", tiny_batch())), lone(**tiny_batch()).logits)
        batch = {name: torch.cat([value, value]) for name, value in tiny_batch().items()}
        rows = mixed(4, "121212", batch)
        assert all(map(torch.equal, mixed(4, "121212", batch), rows))
        assert not all(map(torch.equal, mixed(5, "121212", batch), rows))
        router.evaluation_batch(4)
        own = {name: value[1::2] for name, value in batch.items()}
        torch.testing.assert_close(torch.stack(rows[1::2]), lone(**own).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", SIZES)
def test_every_architecture(model_type: str, tmp_path: Path) -> None:
    first, second = labels(2), labels(4)
    save(tmp_path / "a", first, model_type=model_type, seed=1)
    save(tmp_path / "b", second, model_type=model_type, seed=2, method="head")
    bank = AdapterBank(backbone(model_type))
    bank.add("a.1", tmp_path / "a")
    bank.add("b", tmp_path / "b")
    rows = bank(["b", "a.1", "b"], **tiny_batch())
    torch.testing.assert_close(rows[1], alone(tmp_path / "a", first, model_type)[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack([rows[0], rows[2]]), alone(tmp_path / "b", second, model_type)[::2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "buffer"), [("gptj", "embed_positions"), ("gpt_neo", "attention.bias")])
def test_a_head_with_buffers(model_type: str, buffer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """No folder holds them: a bank's heads have those of the model's own, values and dtype."""
    for seed, options in ((1, labels(2)), (2, labels(3))):
        save(tmp_path / str(seed), options, model_type=model_type, seed=seed, head_modules="transformer.h.1.attn,score")
    model = backbone(model_type)
    cast_parameters(model, dtype)
    bank = AdapterBank(model)
    own = bank.model.get_buffer(f"transformer.h.1.attn.{buffer}").clone()
    for name in ("1", "2"):
        bank.add(name, tmp_path / name)
    copies = [value for name, value in bank.model.named_buffers() if name.startswith("transformer.h.1.attn.") and name.endswith(buffer)]
    assert len(copies) == 3 and all(torch.equal(copy, own) and copy.dtype == own.dtype for copy in copies)
    for name, options in (("1", labels(2)), ("2", labels(3))):
        lone = backbone(model_type, options)
        load_into(lone, tmp_path / name)
        cast_parameters(lone, dtype)
        bank.use(name)
        assert torch.equal(bank.model(**tiny_batch()).logits, lone(**tiny_batch()).logits)
    with pytest.raises(ConfigError, match=r"Attention takes more than one tensor.*its rows cannot be mixed"):
        bank(["1", "2", "1"], **tiny_batch())


def test_a_head_that_labels_tokens(tmp_path: Path) -> None:
    auto_class = "AutoModelForTokenClassification"
    for seed in (2, 3):
        save(tmp_path / str(seed), labels(seed), seed=seed, auto_class=auto_class)
    bank = AdapterBank(backbone(auto_class=auto_class))
    for seed in (2, 3):
        bank.add(str(seed), tmp_path / str(seed))
    rows = bank(["2", "3", "2"], **tiny_batch())
    assert [row.shape for row in rows] == [(7, 2), (7, 3), (7, 2)]
    bank.use("3")
    torch.testing.assert_close(rows[1], bank.model(**tiny_batch()).logits[1], rtol=1e-5, atol=1e-6)


def test_language_models_share_their_head_and_generate(tmp_path: Path) -> None:
    auto_class = "AutoModelForCausalLM"
    for seed in (1, 2):
        save(tmp_path / str(seed), {}, model_type="gpt2", seed=seed, auto_class=auto_class)
    bank = AdapterBank(backbone("gpt2", auto_class=auto_class))
    for seed in (1, 2):
        bank.add(str(seed), tmp_path / str(seed))
    own = backbone("gpt2", auto_class=auto_class)
    load_into(own, tmp_path / "2")
    rows = bank(["1", "2", "1"], **tiny_batch())
    assert rows[0].shape == (7, 50)
    torch.testing.assert_close(rows[1], own(**tiny_batch()).logits[1], rtol=1e-5, atol=1e-6)
    bank.use("2")
    prompt = {name: value[:1] for name, value in tiny_batch().items()}
    assert torch.equal(bank.model.generate(**prompt, max_new_tokens=5), own.generate(**prompt, max_new_tokens=5))


def test_removing_gives_the_model_back(folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    bank = filled(folders)
    bank.use("three")
    bank.remove("three")
    assert bank.names == ("two", "number") and bank.active is None
    assert torch.equal(bank.model(**tiny_batch()).logits, backbone()(**tiny_batch()).logits)
    folder, options = folders["two"]
    bank.use("two")
    assert torch.equal(bank.model(**tiny_batch()).logits, alone(folder, options))
    bank.add("three", folders["three"][0])
    torch.testing.assert_close(bank(["three", "two", "two"], **tiny_batch())[0], alone(*folders["three"])[0], rtol=1e-5, atol=1e-6)
    for name in bank.names:
        bank.remove(name)
    plain = backbone()
    assert [(name, type(module)) for name, module in bank.model.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert bank.model.state_dict().keys() == plain.state_dict().keys()


def test_adapters_follow_the_model(folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    bank = AdapterBank(backbone().bfloat16())
    bank.add("two", folders["two"][0])
    bank.add("number", folders["number"][0])
    assert {parameter.dtype for parameter in bank.model.parameters()} == {torch.bfloat16}
    assert [row.dtype for row in bank(["two", "number", "two"], **tiny_batch())] == [torch.bfloat16] * 3
    bank.model.float()
    torch.testing.assert_close(bank(["number"] * 3, **tiny_batch())[0], alone(*folders["number"])[0], rtol=0.1, atol=0.1)


def test_what_cannot_join(folders: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path) -> None:
    bank = filled(folders)
    before = str(bank.model)
    two = folders["two"][0]
    for name, problem in (("two", "'two' is taken"), ("", "'' is empty")):
        with pytest.raises(ConfigError, match=problem):
            bank.add(name, two)
    other = tiny_model("bert")
    with torch.no_grad():
        other.base_model.get_parameter("encoder.layer.0.output.dense.weight").add_(1.0)
    with pytest.raises(CheckpointError, match="was trained on another backbone"):
        AdapterBank(other).add("two", two)
    AdapterBank(other).add("two", two, allow_other_backbone=True)
    for method in ("bitfit", "full"):
        folder = save(tmp_path / method, labels(2), method=method)
        with pytest.raises(CheckpointError, match=f"method, {method}, trains parameters of the backbone itself"):
            bank.add("x", folder)
    lora = save(tmp_path / "lora", labels(2))
    content = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(content | {"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="load other adapters with PEFT"):
        bank.add("x", lora)
    tokens = save(tmp_path / "tokens", labels(2), auto_class="AutoModelForTokenClassification")
    with pytest.raises(
        CheckpointError, match=r"trained as BertForTokenClassification.*load the backbone with AutoModelForTokenClassification"
    ):
        bank.add("x", tokens)
    nested = save(tmp_path / "nested", labels(2), method="head", head_modules="bert.encoder.layer.1,classifier")
    with pytest.raises(CheckpointError, match=r"it changes bert.encoder.layer.1, and two, .* already changes bert.encoder.layer.1.output"):
        bank.add("x", nested)
    embeddings = save(tmp_path / "embeddings", labels(2), head_modules="bert.embeddings,classifier")
    with pytest.raises(CheckpointError, match=r"cannot join a bank: it trains bert.embeddings, which holds the model's input embeddings"):
        bank.add("x", embeddings)
    assert bank.names == ("two", "three", "number") and str(bank.model) == before
    with pytest.raises(ConfigError, match=r"must be plain, this one has adapters, e.g. at bert.encoder"):
        AdapterBank(bank.model)


def test_wrong_calls(folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    bank = filled(folders)
    for call, message in (
        (lambda: bank.use("four"), "has no adapter four; it has two, three, number"),
        (lambda: bank.remove("four"), "has no adapter four"),
        (lambda: bank.settings("four"), "has no adapter four"),
        (lambda: bank(["two", "four", "five"], **tiny_batch()), "has no adapter five, four; it has two"),
        (lambda: bank(["two", "three"], **tiny_batch()), "2 adapter names for .*'input_ids': 3.*every row needs one"),
        (lambda: bank([], **tiny_batch()), "0 adapter names for"),
        (lambda: bank(["two"] * 3, labels=torch.zeros(3), **tiny_batch()), "takes no labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    # A pass that fails leaves nothing behind.
    with pytest.raises(IndexError):
        bank(["two", "three", "two"], input_ids=torch.full((3, 4), 999))
    assert torch.equal(bank.model(**tiny_batch()).logits, backbone()(**tiny_batch()).logits)


def test_a_decoder_that_flattens_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
    monkeypatch.setitem(SIZES, "opt", sizes | {"max_position_embeddings": 64})
    bank = AdapterBank(backbone("opt"))
    for count in (2, 3):
        save(tmp_path / str(count), labels(count), model_type="opt", seed=count, target_modules=r"model\.decoder\.layers\.\d+\.fc2")
        bank.add(str(count), tmp_path / str(count))
    for width in (7, 3):  # other than the number of rows, and equal to it
        batch = {name: value[:, :width] for name, value in tiny_batch().items()}
        names = ["2", "3", "2"]
        for index, (name, row) in enumerate(zip(names, bank(names, **batch), strict=True)):
            bank.use(name)
            torch.testing.assert_close(row, bank.model(**batch).logits[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [3, 5])
def test_rows_that_cannot_be_told_apart_are_refused(tokens: int, folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    bank = filled(folders)

    class TokensFirst(nn.Module):
        """A layer as XLNet's, and one without padding, sees the batch."""

        def __init__(self, layer: nn.Module, shape: Callable[[Tensor], Tensor]):
            super().__init__()
            self.layer, self.shape = layer, shape

        def forward(self, hidden: Tensor) -> Tensor:
            return self.layer(self.shape(hidden))

    place = "bert.encoder.layer.0.output.dense"
    batch = {"input_ids": torch.full((3, tokens), 7), "attention_mask": torch.ones(3, tokens, dtype=torch.int64)}
    layer = bank.model.get_submodule(place)
    for shape in (lambda hidden: hidden.transpose(0, 1), lambda hidden: hidden.flatten(0, 1)[2:]):
        bank.model.set_submodule(place, TokensFirst(layer, shape))
        with pytest.raises(ConfigError, match=rf"sees shape .* rows of {tokens} tokens, so its rows cannot be told apart"):
            bank(["two", "two", "number"], **batch)
