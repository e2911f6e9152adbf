"""Checkpoints with the key names of the published codes, made from nothing but those names and shapes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adakron import adapter_io, models
from adakron.reference import Imported
from tests.helpers.shared import shared_golden

GLUE_FILE = "pytorch_model_expert_soup.bin"
NLG_FILE = "model.final.pt"


def soup(
    homes: Sequence[str], modules: Mapping[str, tuple[int, int, int]], *, seed: int = 0, random_scores: bool = False
) -> dict[str, Tensor]:
    """Random adapters: module -> (inputs, outputs, experts), in every one of the homes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for home in homes:
        for module, (inputs, outputs, experts) in modules.items():
            prefix = f"{home}.ExpertSoup.{module}"
            tensors[f"{prefix}.expert_score_weight"] = torch.rand(experts, generator=generator) * random_scores
            for expert in range(experts):
                tensors[f"{prefix}.deepspeed_experts.{expert}.weight"] = torch.randn(outputs, inputs, generator=generator) * 0.3
                tensors[f"{prefix}.deepspeed_experts.{expert}.bias"] = torch.randn(outputs, generator=generator) * 0.3
    return tensors


def golden(name: str) -> tuple[Path, Path, dict[str, Tensor]]:
    """Base model folder, checkpoint file and expected tensors of a golden model; skips where it is absent."""
    folder = shared_golden(name)
    file = next(folder / file for file in (GLUE_FILE, NLG_FILE) if (folder / file).is_file())
    return folder / "base", file, load_file(folder / "expected.safetensors")


def stored(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file as they are named there."""
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content.get("model_state_dict", content)


def save_base(folder: Path, model: PreTrainedModel) -> Path:
    """A model folder without a tokenizer."""
    model.save_pretrained(folder)
    return folder


def save_imported(folder: Path, imported: Imported, base: Path, **changes: Any) -> Path:
    """An adapter folder of what was imported."""
    trained = {name: parameter for name, parameter in imported.model.named_parameters() if parameter.requires_grad}
    settings: dict[str, Any] = {
        "tensors": {**trained, **models.adapter_buffers(imported.model, imported.info)},
        "adapter": imported.adapter,
        "info": imported.info,
        "base_model": str(base),
        "auto_class": imported.auto_class,
        "model_options": imported.model_options,
        "extra": imported.extra,
    }
    adapter_io.save_adapter(folder, **(settings | changes))
    return folder


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same keys, each with the same bits."""
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
