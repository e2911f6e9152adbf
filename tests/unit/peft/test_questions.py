"""Encoders for question answering through PEFT: token types must reach them."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import adakron.peft  # noqa: F401, registers AdaKron with PEFT
from adakron import adapter_io, models
from adakron.config import AdapterConfig
from adakron.peft import folders
from adakron.peft.methods import attach, quiet_peft
from tests.helpers.architectures import tiny_batch, tiny_model

AUTO_CLASS = "AutoModelForQuestionAnswering"
BATCH = {**tiny_batch(), "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3)}


def encoder() -> nn.Module:
    return tiny_model("bert", auto_class=AUTO_CLASS, num_labels=2)


def starts(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**BATCH).start_logits
    return found


def randomize(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random values for what trains, which is returned."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return {name: p.detach() for name, p in trained.items()}


def test_a_method_of_peft_answers_the_same_once_it_is_loaded(tmp_path: Path) -> None:
    attached = attach(encoder(), AdapterConfig(method="lora"), seed=0)
    tensors = randomize(attached.model)
    expected = starts(attached.model)
    folders.save(tmp_path, attached, tensors=tensors, base_model="some/model", auto_class=AUTO_CLASS, model_options={"num_labels": 2})
    assert torch.equal(starts(folders.load(encoder(), tmp_path)), expected)
    with quiet_peft():
        assert torch.equal(starts(PeftModel.from_pretrained(encoder(), tmp_path)), expected)


def test_our_folder_answers_the_same_through_peft(tmp_path: Path) -> None:
    model = encoder()
    config = AdapterConfig(bottleneck_dim=8)
    info = models.adapt(model, config, seed=0)
    tensors = randomize(model)
    expected = starts(model)
    adapter_io.save_adapter(
        tmp_path,
        tensors=tensors,
        adapter=config,
        info=info,
        base_model="some/model",
        auto_class=AUTO_CLASS,
        model_options={"num_labels": 2},
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["qa_outputs"]
    again = encoder()
    adapter_io.load_into(again, tmp_path)
    assert torch.equal(starts(again), expected)
    with quiet_peft():
        assert starts(PeftModel.from_pretrained(encoder(), tmp_path)) == pytest.approx(expected, abs=1e-6)


def test_peft_still_drops_token_types_of_questions() -> None:
    with quiet_peft():
        model = get_peft_model(encoder(), LoraConfig(task_type="QUESTION_ANS"))
    typed = starts(model)
    with torch.no_grad():
        untyped = model(**{**BATCH, "token_type_ids": None}).start_logits
    assert torch.equal(typed, untyped), "PEFT passes them on now: adapter_io.saved_task_type may name the task again"
