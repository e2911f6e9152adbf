from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adakron import causal
from adakron.config import AdapterConfig
from adakron.errors import ConfigError
from adakron.models import adapt, checkpoint_activations, route_experts
from tests.helpers.architectures import DECODERS, tiny_model

TOKENS = torch.arange(2, 34).reshape(2, 16) % 50
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def language_model(model_type: str = "gpt2", **options: Any) -> nn.Module:
    model = tiny_model(model_type, auto_class="AutoModelForCausalLM", **options)
    adapt(model, AdapterConfig(bottleneck_dim=8), seed=3)
    causal.accept_targets(model)
    return model


@pytest.mark.parametrize("model_type", DECODERS)
def test_logits_at_targets_are_those_of_the_whole_pass(model_type: str) -> None:
    model = language_model(model_type)
    positions = torch.tensor([3, 4, 15, 16, 30])
    whole = model(input_ids=TOKENS).logits
    found = model(input_ids=TOKENS, target_positions=positions).logits
    assert found.shape == (1, 5, 50), "no logits but those at the targets"
    torch.testing.assert_close(found[0], whole.flatten(0, 1)[positions], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, whole)  # the next pass is an ordinary one


def test_the_projection_never_sees_other_positions() -> None:
    model = language_model()
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.numel()))  # type: ignore[operator]
    model(input_ids=TOKENS, target_positions=torch.tensor([1, 20]))
    assert seen == [2 * 50]


def test_gradients_at_targets_under_activation_checkpointing() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = language_model(**NO_DROPOUT).double().train()
        if checkpointed:
            checkpoint_activations(model)
        if checkpointed:
            logits = model(input_ids=TOKENS, target_positions=torch.tensor([3, 20]), use_cache=False).logits[0]
        else:
            logits = model(input_ids=TOKENS).logits.flatten(0, 1)[[3, 20]]
        logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def packed() -> dict[str, Tensor]:
    """Two rows: examples of 5 and 3 tokens and padding; one of 4 and padding."""
    parts = [TOKENS[0, :5], TOKENS[1, :3], TOKENS[0, 8:12]]
    ids, positions, segments = (torch.zeros(2, 9, dtype=torch.int64) for _ in range(3))
    for row, column, number, part in ((0, 0, 1, parts[0]), (0, 5, 2, parts[1]), (1, 0, 1, parts[2])):
        where = (row, slice(column, column + len(part)))
        ids[where], positions[where], segments[where] = part, torch.arange(len(part)), number
    return {"input_ids": ids, "position_ids": positions, "segments": segments}


WAYS = [(kind, way) for kind in causal.PACKABLE for way in ("eager", "sdpa") if (kind, way) != ("gemma2", "sdpa")]  # its cap is eager only


@pytest.mark.parametrize(("model_type", "attention"), WAYS)
def test_a_packed_example_is_computed_as_if_alone(model_type: str, attention: str) -> None:
    window: dict[str, Any] = {"sliding_window": 5} if model_type in ("mistral", "gemma2") else {}
    model = language_model(model_type, **window).double()
    model.set_attn_implementation(attention)  # type: ignore[operator]
    causal.check_packing(model, 5)
    batch = packed()
    together = model(**batch, use_cache=False).logits
    alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in (TOKENS[0, :5], TOKENS[1, :3], TOKENS[0, 8:12])]
    for found, expected in zip((together[0, :5], together[0, 5:8], together[1, :4]), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", sorted({*DECODERS} - {*causal.PACKABLE}))
def test_architectures_that_mix_packed_examples_are_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match=r"takes no positions or no attention mask of ours .*drop --pack"):
        causal.check_packing(language_model(model_type), 5)


def test_windows_and_kernels_that_packing_does_not_reach_are_refused() -> None:
    with pytest.raises(ConfigError, match="attend to 4 tokens back"):
        causal.check_packing(language_model("mistral"), 5)
    model = language_model()
    model.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="flash_attention_2 takes no attention mask"):
        causal.check_packing(model, 5)


def test_an_encoder_has_nothing_to_select_and_is_left_alone() -> None:
    model = tiny_model("bert")
    causal.accept_targets(model)
    assert not model._forward_pre_hooks


def test_a_mixture_routes_as_before() -> None:
    model = tiny_model("gpt2", auto_class="AutoModelForCausalLM", **NO_DROPOUT)
    adapt(model, AdapterConfig(method="madakron", bottleneck_dim=8), seed=3)
    router = route_experts(model, 1)
    assert router is not None
    causal.accept_targets(model)
    model.train()
    router.training_pass(0, 0, 0)
    whole = model(input_ids=TOKENS).logits
    router.training_pass(0, 0, 0)
    torch.testing.assert_close(model(input_ids=TOKENS, target_positions=torch.tensor([7])).logits[0, 0], whole[0, 7], rtol=1e-5, atol=1e-6)
