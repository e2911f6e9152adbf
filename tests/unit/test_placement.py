"""Which layers `find_sites` chooses, and what it says about arguments that choose none."""

import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from adakron.errors import ConfigError
from adakron.placement import PLACEMENT, find_sites
from tests.helpers.architectures import DECODERS, ENCODER_DECODERS, SIZES, tiny_model

FFN = [f"bert.encoder.layer.{n}.output.dense" for n in (0, 1)]
ATTENTION = [f"bert.encoder.layer.{n}.attention.output.dense" for n in (0, 1)]


def test_every_architecture_has_a_tiny_model() -> None:
    assert {*PLACEMENT} == {*SIZES}
    assert {*DECODERS, *ENCODER_DECODERS} < {*PLACEMENT}


def test_positions() -> None:
    model = tiny_model("bert")
    assert find_sites(model) == find_sites(model, position="ffn") == FFN
    assert find_sites(model, position="attention") == ATTENTION
    assert find_sites(model, position="both") == [ATTENTION[0], FFN[0], ATTENTION[1], FFN[1]]
    # A pattern of one's own is all that counts.
    assert find_sites(model, r".*\.intermediate\.dense", position="both") == [f"bert.encoder.layer.{n}.intermediate.dense" for n in (0, 1)]


def test_cross_attention_gets_no_adapter() -> None:
    config = AutoConfig.for_model("bert", **SIZES["bert"], vocab_size=50, is_decoder=True, add_cross_attention=True)
    model = AutoModelForSequenceClassification.from_config(config)
    assert any(name.endswith("crossattention.output.dense") for name, _ in model.named_modules())
    assert find_sites(model, position="both") == [ATTENTION[0], FFN[0], ATTENTION[1], FFN[1]]
    for model_type in ENCODER_DECODERS:
        names = find_sites(tiny_model(model_type), position="both")
        assert not [name for name in names if "EncDec" in name or "encoder_attn" in name]


def test_layers_of_albert_are_groups() -> None:
    model = tiny_model("albert", num_hidden_layers=4, num_hidden_groups=2)
    names = [f"albert.encoder.albert_layer_groups.{n}.albert_layers.0.ffn_output" for n in (0, 1)]
    assert find_sites(model) == names
    assert find_sites(model, layers="1") == names[1:]


@pytest.mark.parametrize(
    ("layers", "kept"), [("0", [0]), ("0,2-4", [0, 2, 3, 4]), ("5-5, 1", [1, 5]), (" 4 - 5 ,4", [4, 5]), ("0-5", [0, 1, 2, 3, 4, 5])]
)
def test_layer_subsets(layers: str, kept: list[int]) -> None:
    with torch.device("meta"):
        model = tiny_model("llama", num_hidden_layers=6)
    assert find_sites(model, layers=layers) == [f"model.layers.{n}.mlp.down_proj" for n in kept]
    both = [f"model.layers.{n}.{part}" for n in kept for part in ("self_attn.o_proj", "mlp.down_proj")]
    assert find_sites(model, position="both", layers=layers) == both
    # Layers narrow a pattern of one's own, too; what lies in no layer is not in these.
    assert find_sites(model, r".*(up_proj|score)", layers=layers) == [f"model.layers.{n}.mlp.up_proj" for n in kept]


def test_layers_count_within_each_stack() -> None:
    assert find_sites(tiny_model("bart"), layers="1") == ["model.encoder.layers.1.fc2", "model.decoder.layers.1.fc2"]
    assert find_sites(tiny_model("t5"), position="attention", layers="0") == [
        "transformer.encoder.block.0.layer.0.SelfAttention.o",
        "transformer.decoder.block.0.layer.0.SelfAttention.o",
    ]


def test_exclusions() -> None:
    assert find_sites(tiny_model("bart"), exclude_modules=r".*\.encoder\..*") == [f"model.decoder.layers.{n}.fc2" for n in (0, 1)]
    model = tiny_model("bert")
    assert find_sites(model, position="both", exclude_modules=r".*\.attention\..*", layers="1") == FFN[1:]
    # Exclusion comes first, so a generous pattern may match what is no linear layer.
    assert find_sites(model, r".*layer\.\d+\.output\..*", exclude_modules=r".*(LayerNorm|dropout)") == FFN
    assert find_sites(model, exclude_modules=re.escape(FFN[0])) == FFN[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position": "mlp"}, r"position is 'mlp'; it must be one of ffn, attention, both \(set --position\)"),
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression: .*--target_modules"),
        ({"exclude_modules": "["}, r"exclude_modules '\[' is not a regular expression: .*--exclude_modules"),
        ({"exclude_modules": "layer.0"}, r"'layer.0' matches none of the layers to adapt, bert\..*whole.*--exclude_modules, or drop it"),
        ({"exclude_modules": r".*\.attention\..*"}, "matches none of the layers to adapt"),
        ({"exclude_modules": ".*"}, r"'\.\*' leaves no layer to adapt of bert.encoder.*--exclude_modules"),
        ({"layers": "2"}, r"layers '2' names 2; the layers to adapt lie in 0, 1 \(set --layers\)"),
        ({"layers": "1-999999"}, r"names 2, 3, .* and \d+ more; the layers to adapt lie in 0, 1"),
        ({"layers": "1", "exclude_modules": r".*\.1\..*"}, "layers '1' names 1; the layers to adapt lie in 0 "),
        ({"layers": "0", "target_modules": "bert.pooler.dense"}, r"names 0; the layers to adapt lie in none \(set --layers\)"),
        ({"target_modules": "nothing"}, r"'nothing' matches no module of BertForSequenceClassification.*--target_modules"),
    ],
)
def test_arguments_that_choose_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_sites(tiny_model("bert"), **arguments)


@pytest.mark.parametrize(
    "layers", ["", ",", "1,", "a", "-1", "1-", "5-2", "1.0", "0;1", "0 1", "1--2", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 9999]
)
def test_malformed_layers(layers: str) -> None:
    with pytest.raises(ConfigError, match=r"it must be layer numbers and ranges from low to high, such as 0,2-5 \(set --layers\)"):
        find_sites(tiny_model("bert"), layers=layers)


def test_all_malformed_arguments_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        find_sites(tiny_model("bert"), "(", position="x", exclude_modules="(", layers="?")  # type: ignore[arg-type]
    assert [problem.split()[0] for problem in caught.value.problems] == ["position", "target_modules", "exclude_modules", "layers"]


def test_a_bloom_that_goes_past_its_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"BloomForSequenceClassification with slow_but_exact and pretraining_tp 2.*--model_name_or_path"):
        find_sites(tiny_model("bloom", slow_but_exact=True, pretraining_tp=2))
    assert len(find_sites(tiny_model("bloom", slow_but_exact=True))) == len(find_sites(tiny_model("bloom", pretraining_tp=2))) == 2
