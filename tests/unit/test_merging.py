"""Experts averaged into one: the numbers of the mixture in evaluation, in a folder that loads like any other."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adakron.adapter_io import adapter_tensor_names, load_into, merge_experts, save_adapter
from adakron.config import AdapterConfig
from adakron.errors import ConfigError
from adakron.models import adapt, adapter_buffers
from adakron.trainable import AdaptedModelInfo, parameter_report
from tests.helpers.architectures import tiny_batch, tiny_model

LABELS = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}


def mixture(adapter: AdapterConfig) -> tuple[dict[str, Tensor], AdaptedModelInfo, Tensor]:
    """Tensors of a model whose experts differ widely, what trains in it, and its logits in evaluation."""
    model = tiny_model("bert")
    info = adapt(model, adapter, seed=3)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
        logits = model(**tiny_batch()).logits
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **adapter_buffers(model, info)}, info, logits


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(method="madakron", bottleneck_dim=12, kron_factor=3, expert_scores="random"),
        AdapterConfig(method="madakron_partial", bottleneck_dim=8, num_experts=3),
        AdapterConfig(bottleneck_dim=8, num_experts=2, experts_in="down_b,up", factor_order="b_major", expert_scores="random"),
        AdapterConfig(method="adamix", bottleneck_dim=8, experts_in="down,up", tune_expert_scores=True),
    ],
    ids=["both", "partial", "up", "adamix-tuned"],
)
def test_the_merged_adapter_computes_what_the_mixture_did(adapter: AdapterConfig, tmp_path: Path) -> None:
    tensors, info, logits = mixture(adapter)
    merged, single = merge_experts(tensors, adapter, info.sites)
    assert (single.num_experts, single.experts_in, single.method) == (1, "", adapter.method)
    assert not [name for name in merged if name.endswith("expert_scores")]
    untouched = [name for name in merged if not any(f".{projection}." in name for projection in adapter.resolved().expert_projections)]
    assert untouched and all(torch.equal(merged[name], tensors[name]) for name in untouched)
    save_adapter(
        tmp_path, tensors=merged, adapter=single, info=info, base_model="m", auto_class="AutoModelForSequenceClassification",
        model_options=LABELS,
    )  # fmt: skip
    fresh = tiny_model("bert")
    loaded = load_into(fresh, tmp_path)
    assert len(loaded.adapter_parameters) == len(info.sites) * len(adapter_tensor_names(single))
    with torch.no_grad():
        assert torch.allclose(fresh(**tiny_batch()).logits, logits, rtol=1e-5, atol=1e-6)


def test_the_size_of_one_expert_is_left() -> None:
    adapter = AdapterConfig(method="madakron", bottleneck_dim=12, kron_factor=3)
    tensors, info, _ = mixture(adapter)
    merged, single = merge_experts(tensors, adapter, info.sites)
    model = tiny_model("bert")
    report = parameter_report(model, adapt(model, single, seed=0))
    assert report.adapter == sum(tensor.numel() for name, tensor in merged.items() if "adakron_adapter" in name)


def test_the_shares_follow_the_scores() -> None:
    adapter = AdapterConfig(method="madakron_partial", bottleneck_dim=8, num_experts=2)
    tensors, info, _ = mixture(adapter)
    prefix = f"{info.sites[0]}.adakron_adapter.down_a"
    tensors[f"{prefix}.expert_scores"] = torch.tensor([0.0, 50.0])
    merged, _ = merge_experts(tensors, adapter, info.sites)
    assert torch.equal(merged[f"{prefix}.weight"], tensors[f"{prefix}.weight"][1])
    other = f"{info.sites[1]}.adakron_adapter.down_a.bias"
    assert torch.allclose(merged[other], tensors[other].mean(0), rtol=1e-6, atol=0)


def test_one_expert_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to merge: the adakron adapter has one expert"):
        merge_experts({}, AdapterConfig(), [])
