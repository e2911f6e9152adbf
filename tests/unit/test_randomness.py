"""Masks of a whole model: every dropout of every architecture follows its example."""

import logging
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adakron.config import AdapterConfig
from adakron.errors import ConfigError
from adakron.models import adapt, checkpoint_activations
from adakron.nn import TableDropout
from adakron.peft.methods import attach
from adakron.randomness import mask_dropout
from tests.helpers.adapted_models import WIDTH
from tests.helpers.architectures import SIZES, tiny_batch, tiny_model

WITHOUT_SDPA = ("deberta", "deberta-v2", "mpnet", "gpt_neo", "gptj", "bloom", "gemma2")


def dropping(model_type, attention="eager"):
    """A tiny model in training mode, all of whose rates of dropout are 0.25, with weights as of a trained one."""
    rates = {
        name: 0.25
        for name, value in tiny_model(model_type).config.to_dict().items()
        if re.search("dropout|pdrop|layerdrop", name) and (value is None or (isinstance(value, int | float) and value is not False))
    }
    model = tiny_model(model_type, attn_implementation=attention, **rates)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, WIDTH**-0.5, generator=generator)
    return model.train()


def logits(model, masks, rows, width=7, step=0):
    """Of some rows of a batch, as examples 10, 11 and 12, padded to a width."""
    masks.training_pass(step, 0, np.array(rows) + 10)
    batch = {name: F.pad(tensor[rows][:, : min(width, 7)], (0, max(0, width - 7))) for name, tensor in tiny_batch().items()}
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(name, "eager") for name in SIZES] + [(name, "sdpa") for name in SIZES if name not in WITHOUT_SDPA],
)
def test_an_example_loses_the_same_in_any_batch(model_type, attention):
    model = dropping(model_type, attention)
    masks = mask_dropout(model, seed=5)
    state = torch.get_rng_state()
    whole = logits(model, masks, [0, 1, 2])
    apart = torch.cat([logits(model, masks, [0], 9), logits(model, masks, [1]), logits(model, masks, [2], 5)])
    assert (apart - whole).norm() <= 1e-5 * whole.norm()
    assert (logits(model, masks, [2, 0], 8) - whole[[2, 0]]).norm() <= 1e-5 * whole.norm()
    assert (logits(model, masks, [0, 1, 2], step=1) - whole).norm() > 0.1 * whole.norm()
    assert torch.equal(torch.get_rng_state(), state), "something still draws from torch's generator"


def test_without_masks_an_example_depends_on_its_batch():
    model = dropping("bert")
    batch = tiny_batch()
    with torch.no_grad():
        torch.manual_seed(0)
        whole = model(**batch).logits
        torch.manual_seed(0)
        apart = torch.cat([model(**{name: tensor[[row]] for name, tensor in batch.items()}).logits for row in range(3)])
    assert (apart - whole).norm() > 0.1 * whole.norm()


def test_evaluation_has_no_dropout():
    model = dropping("bert")
    expected = model.eval()(**tiny_batch()).logits
    mask_dropout(model, seed=5)
    assert torch.equal(model(**tiny_batch()).logits, expected)


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "gpt2", "opt", "t5", "bart"])
def test_activations_computed_again_lose_the_same(model_type):
    gradients = []
    for again in (False, True):
        model = dropping(model_type)
        adapt(model, AdapterConfig(bottleneck_dim=8), seed=1)
        masks = mask_dropout(model, seed=5)
        if again:
            checkpoint_activations(model, None, masks)
        masks.training_pass(0, 0, np.arange(3))
        loss = model(**tiny_batch()).logits.square().sum()
        masks.training_pass(0, 1, np.arange(3))  # as a second pass of a consistency loss would
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-5


def test_the_dropout_of_peft_methods_is_covered():
    model = tiny_model("opt", dropout=0.0, attention_dropout=0.0)
    attached = attach(model, AdapterConfig(method="lora", method_config='{"lora_dropout": 0.5, "target_modules": ["fc2"]}'), seed=0)
    for name, parameter in attached.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    masks = mask_dropout(attached.model, seed=5)
    attached.model.train()
    whole = logits(attached.model, masks, [0, 1, 2])
    apart = torch.cat([logits(attached.model, masks, [row], 8) for row in range(3)])
    assert (apart - whole).norm() <= 1e-5 * whole.norm()
    assert (logits(attached.model, masks, [0, 1, 2], step=1) - whole).norm() > 0.01 * whole.norm()


def test_tables_of_positions_are_no_examples():
    model = dropping("deberta-v2")
    mask_dropout(model, seed=5)
    tables = [module for module in model.modules() if isinstance(module, TableDropout)]
    assert len(tables) == 2 and all(table.p == 0.25 and table.training for table in tables)


def test_dropout_inside_a_kernel_is_refused_with_the_remedy():
    model = tiny_model("bert")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"attention_probs_dropout_prob 0\.1.*set --attn_implementation sdpa or eager"):
        mask_dropout(model, seed=5)
    model.config.attention_probs_dropout_prob = 0.0
    mask_dropout(model, seed=5)


class Noisy(nn.Module):
    """Draws numbers that are not dropout's."""

    def forward(self, input_ids):
        return input_ids + torch.randn(input_ids.shape)


def test_other_random_numbers_are_pointed_out_once(caplog):
    model = nn.Sequential(Noisy(), nn.Linear(4, 4))
    masks = mask_dropout(model, seed=5)
    with caplog.at_level(logging.WARNING, "adakron"):
        for step in range(2):
            masks.training_pass(step, 0, np.arange(2))
            model(torch.zeros(2, 4))
    assert [record.message.count("not dropout's") for record in caplog.records] == [1]


def test_a_pass_that_was_not_announced_is_an_error():
    model = tiny_model("bert").train()
    mask_dropout(model, seed=5)
    with pytest.raises(ConfigError, match="3 rows, and none was announced"):
        model(**tiny_batch())
    assert F.dropout.__name__ == "dropout"
