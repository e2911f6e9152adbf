"""Encoders without padding compute what padded ones do: losses, gradients, dropout."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model

from adakron.config import AdapterConfig
from adakron.models import adapt, checkpoint_activations
from adakron.nn import native, rows
from adakron.randomness import mask_dropout
from adakron.unpadding import STACKS, Unpadding, unpad
from tests.helpers.architectures import SIZES, WITHOUT_CHECKPOINTING, tiny_batch, tiny_model
from tests.unit.test_randomness import dropping

ADAPTER = AdapterConfig(bottleneck_dim=8, kron_factor=4)
RELATIVE = 1e-5


@dataclasses.dataclass
class Step:
    """A training step of a model. shapes: of what its first linear layer in the stack saw."""

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    shapes: Sequence[torch.Size]


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def kernels(request):
    """Both, one after the other."""
    if request.param == "compiled":
        problem = native.load()
        if problem is not None:
            pytest.skip(problem)
    yield request.param
    native.unload()


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """The tiny batch has 19 tokens and 2 places of padding: they stand in a row of 20."""
    monkeypatch.setattr(rows, "MULTIPLE", 5)


def step(model: Any, *, unpadded: bool, checkpointed: bool = False, masked: bool = True) -> Step:
    model = copy.deepcopy(model)
    adapt(model, ADAPTER, seed=1)
    masks = mask_dropout(model, seed=5) if masked else None
    found = unpad(model, masks) if unpadded else None
    assert unpadded is isinstance(found, Unpadding), found
    if checkpointed:
        checkpoint_activations(model, masks, found)
    shapes: list[torch.Size] = []
    stack = model.base_model.get_submodule(STACKS[model.config.model_type])
    layer = next(one for name, one in stack.named_modules() if isinstance(one, torch.nn.Linear) and "embedding" not in name)
    layer.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    model.train()
    if masks is not None:
        masks.training_pass(3, 0, np.array([10, 11, 12]))
    return passed(model, shapes)


def passed(model: Any, shapes: Sequence[torch.Size] = ()) -> Step:
    """A forward and a backward pass of a model that is ready."""
    logits = model(**tiny_batch()).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0])).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return Step(logits.detach(), gradients, shapes)


def assert_same(found: Step, expected: Step) -> None:
    assert (found.logits - expected.logits).norm() <= RELATIVE * expected.logits.norm()
    assert found.gradients.keys() == expected.gradients.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.gradients.values()]).norm()
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= RELATIVE * whole, name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", STACKS)
def test_a_step_is_that_of_a_padded_batch_with_the_same_dropout(model_type, attention):
    model = dropping(model_type, attention)
    expected, found = step(model, unpadded=False), step(model, unpadded=True)
    assert expected.shapes[0][:2] == (3, 7) == tiny_batch()["attention_mask"].shape
    assert found.shapes[0][:2] == (1, 20)
    assert_same(found, expected)
    assert (step(model, unpadded=True, masked=False).logits - expected.logits).norm() > 0.01  # dropout was on


@pytest.mark.parametrize("model_type", [name for name in STACKS if name not in WITHOUT_CHECKPOINTING])
def test_what_is_computed_again_is_the_same_again(model_type):
    model = dropping(model_type, "sdpa")
    found = step(model, unpadded=True, checkpointed=True)
    assert len(found.shapes) == 2 and len(set(found.shapes)) == 1
    assert_same(found, step(model, unpadded=False))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_evaluation_keeps_its_padding_and_its_bits(attention):
    model = tiny_model("bert", attn_implementation=attention).eval()
    expected = model(**tiny_batch()).logits
    assert isinstance(unpad(model, None), Unpadding)
    model.train()(**tiny_batch())
    assert torch.equal(model.eval()(**tiny_batch()).logits, expected)


@pytest.mark.parametrize(("multiple", "shape"), [(1, (1, 19)), (32, (1, 21))])
def test_rows_have_few_lengths_and_where_they_would_not_be_shorter_the_rectangle_stays(monkeypatch, multiple, shape):
    monkeypatch.setattr(rows, "MULTIPLE", multiple)
    model = dropping("bert", "sdpa")
    found = step(model, unpadded=True)
    assert found.shapes[0][:2] == shape
    assert_same(found, step(model, unpadded=False))


def _replaces_bias(layer: torch.nn.Linear) -> None:
    layer.bias = torch.nn.Parameter(layer.bias.detach() + 1.0, requires_grad=False)


def _wraps_forward(layer: torch.nn.Linear) -> None:
    inner = layer.forward
    layer.forward = lambda x: inner(x) + 1.0


def _watches_gradient(layer: torch.nn.Linear) -> None:
    layer.register_full_backward_hook(lambda module, to_input, to_output: (2 * to_input[0],))


@pytest.mark.parametrize("change", [_replaces_bias, _wraps_forward, _watches_gradient])
def test_what_is_done_to_a_linear_layer_between_steps_counts(change):
    """Queries, keys and values are one matrix product from the first step on, while nothing stands in its way."""
    found = []
    for unpadded in (False, True):
        model = tiny_model("bert", attn_implementation="sdpa", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        adapt(model, ADAPTER, seed=1)
        if unpadded:
            assert isinstance(unpad(model, None), Unpadding)
        model(**tiny_batch())
        change(model.get_submodule("bert.encoder.layer.1.attention.self.value"))
        found.append(passed(model))
    assert_same(found[1], found[0])


def test_dropout_around_the_queries_is_that_of_a_padded_batch():
    """The last layer asks for the first tokens alone."""
    found = []
    for unpadded in (False, True):
        model = tiny_model("bert", attn_implementation="sdpa")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(LoraConfig(target_modules=["query"], lora_dropout=0.3, init_lora_weights=False), model)
        masks = mask_dropout(model, seed=5)
        assert not unpadded or isinstance(unpad(model, masks), Unpadding)
        model.train()
        masks.training_pass(3, 0, np.array([10, 11, 12]))
        found.append(passed(model))
    assert_same(found[1], found[0])


def test_two_models_of_a_process_do_not_meet():
    models = [tiny_model("bert", attn_implementation="sdpa").train() for _ in range(2)]
    plain = tiny_model("bert", attn_implementation="sdpa")
    assert all(isinstance(unpad(model, None), Unpadding) for model in models)
    longer = {name: torch.cat([tensor, tensor], 0) for name, tensor in tiny_batch().items()}
    first, second = models[0](**tiny_batch()).logits, models[1](**longer).logits
    assert first.shape[0] == 3 and second.shape[0] == 6
    assert plain.config._attn_implementation == "sdpa"


def test_a_pass_that_fails_leaves_nothing_behind():
    model = tiny_model("bert", attn_implementation="sdpa").train()
    masks = mask_dropout(model, seed=5)
    assert isinstance(unpad(model, masks), Unpadding)
    masks.training_pass(0, 0, np.arange(3))
    broken = model.bert.encoder.layer[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        model(**tiny_batch())
    broken.remove()
    assert masks.places is None
    with torch.no_grad():
        assert model.eval()(**tiny_batch()).logits.shape[0] == 3


@pytest.mark.parametrize("model_type", [name for name in SIZES if name not in STACKS])
def test_other_architectures_are_left_as_they_are(model_type):
    model = tiny_model(model_type)
    before = model.config._attn_implementation
    assert f"model type {model_type!r} is none of bert, roberta" in str(unpad(model, None))
    assert model.config._attn_implementation == before


def test_attention_that_was_asked_for_is_kept():
    model = tiny_model("bert", attn_implementation="sdpa")
    model.config._attn_implementation = "flash_attention_2"
    assert unpad(model, None) == "its attention is flash_attention_2, neither eager nor sdpa"
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_a_model_that_peft_wraps_computes_no_padding_either(model_type):
    targets = ["query", "value"] if model_type == "bert" else ["q_lin", "v_lin"]
    found = []
    for unpadded in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(dropping(model_type, "sdpa"), LoraConfig(target_modules=targets, lora_dropout=0.2, init_lora_weights=False))
        masks = mask_dropout(model, seed=5)
        assert not unpadded or isinstance(unpad(model, masks), Unpadding)
        masks.training_pass(0, 0, np.arange(3))
        found.append(passed(model.train()))
    assert_same(found[1], found[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_methods_that_put_tokens_before_texts_stay_padded():
    model = get_peft_model(tiny_model("bert"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    assert unpad(model, None) == "its method puts tokens of its own before every text"
