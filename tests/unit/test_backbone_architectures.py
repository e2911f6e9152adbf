"""What `adakron.backbone` must know of each architecture: lengths, heads, padding, the end of a text."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from adakron.architecture import position_limit
from adakron.backbone import Backbone, load_backbone
from adakron.config import AdapterConfig, ModelConfig
from adakron.errors import ConfigError
from adakron.models import adapt, check_architecture
from adakron.trainable import assert_trainable
from tests.helpers.architectures import DECODERS, ENCODER_DECODERS, SIZES, language_model_class, tiny_model
from tests.helpers.letters import letter_tokenizer

CLASSIFIER = "AutoModelForSequenceClassification"
OPTIONS: dict[str, Any] = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
PAD, END = 0, 1
LETTERS = ("<pad>", "</s>", "[UNK]", *"abcdefghij")
RELATIVE = ("bloom", "t5", "mt5")
ROTARY = ("modernbert", "phi", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
HEADS = {
    "bert": ("classifier",),
    "roberta": ("classifier",),
    "xlm-roberta": ("classifier",),
    "camembert": ("classifier",),
    "electra": ("classifier",),
    "deberta": ("pooler", "classifier"),
    "deberta-v2": ("pooler", "classifier"),
    "distilbert": ("pre_classifier", "classifier"),
    "albert": ("classifier",),
    "mpnet": ("classifier",),
    "modernbert": ("head", "classifier"),
    **dict.fromkeys(DECODERS, ("score",)),
    **dict.fromkeys(ENCODER_DECODERS, ("classification_head",)),
}


def tokenizer_of(*, ends: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """One token per letter; ends: a text, or each text of a pair, ends in </s>, as T5's and BART's do."""
    names = {"unk_token": "[UNK]", "pad_token": "<pad>", "eos_token": "</s>"} | options
    tokenizer = letter_tokenizer(special=False, vocabulary=LETTERS, **names)
    if ends:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
        )
    return tokenizer


def save(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerFast, *, auto_class: str | None = None, **options: Any) -> Path:
    """The architecture's pretrained checkpoint, which is a language model, with a tokenizer."""
    tiny_model(model_type, auto_class=auto_class or language_model_class(model_type), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, auto_class: str = CLASSIFIER) -> Backbone:
    return load_backbone(ModelConfig(model_name_or_path=str(folder)), auto_class=auto_class, options=OPTIONS, seed=3)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("model_type", SIZES)
def test_position_limit_is_the_longest_input(model_type: str, padding: int) -> None:
    model = tiny_model(model_type, pad_token_id=padding, eos_token_id=49)
    limit = position_limit(model.config)
    assert (limit == sys.maxsize) == (model_type in RELATIVE)

    def logits(length: int) -> torch.Tensor:
        input_ids = torch.full((1, length), 5)
        input_ids[0, -1] = 49
        return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits

    assert logits(min(limit, 600)).isfinite().all()
    if model_type not in (*RELATIVE, *ROTARY):
        with pytest.raises((IndexError, RuntimeError)):
            logits(limit + 1)


@pytest.mark.parametrize("model_type", SIZES)
def test_a_language_model_becomes_a_classifier(model_type: str, tmp_path: Path) -> None:
    folder = save(tmp_path, model_type, tokenizer_of())
    loaded = load(folder)
    info = adapt(loaded.model, AdapterConfig(bottleneck_dim=8), seed=0, new_parameters=loaded.new_parameters)
    assert_trainable(loaded.model, info)
    # A checkpoint of a masked language model has no pooler; BERT's and ALBERT's lie in the backbone.
    pooler = {"bert": ("bert.pooler",), "albert": ("albert.pooler",)}.get(model_type, ())
    assert info.head_modules == HEADS[model_type] + pooler
    # Rows of several lengths: each gives what it gives alone.
    texts = ["a b c d e f", "g h", ""]
    padded = loaded.model(**loaded.tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = [loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits for text in texts]
    torch.testing.assert_close(padded, torch.cat(alone))
    assert not torch.allclose(padded[0], padded[1])
    config = ModelConfig(model_name_or_path=str(folder))
    checked = check_architecture(config, AdapterConfig(bottleneck_dim=8), auto_class=CLASSIFIER, options=OPTIONS)
    assert checked.sites == info.sites and checked.head_modules == HEADS[model_type]


@pytest.mark.parametrize("declared", [None, -1, 7])
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_whose_tokenizer_has_no_padding_token(model_type: str, declared: int | None, tmp_path: Path) -> None:
    loaded = load(save(tmp_path, model_type, tokenizer_of(ends=False, pad_token=None), pad_token_id=declared))
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == END
    texts = ["a b c d", "e e", "f"]
    padded = loaded.model(**loaded.tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = [loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits for text in texts]
    torch.testing.assert_close(padded, torch.cat(alone))


def test_roberta_keeps_the_padding_index_its_positions_start_from(tmp_path: Path) -> None:
    loaded = load(save(tmp_path, "roberta", tokenizer_of(), pad_token_id=3))
    assert (loaded.model.config.pad_token_id, loaded.tokenizer.pad_token_id, loaded.tokenizer.model_max_length) == (3, PAD, 62)


def test_a_tokenizer_that_cannot_pad(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", tokenizer_of(ends=False, pad_token=None, eos_token=None))
    with pytest.raises(ConfigError, match=r"has neither a padding nor an end-of-sequence token.*--tokenizer_name"):
        load(folder)


@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_an_encoder_decoder_reads_the_end_of_the_text(model_type: str, tmp_path: Path) -> None:
    loaded = load(save(tmp_path, model_type, tokenizer_of()))
    tokenizer = loaded.tokenizer
    cut = tokenizer(["a b c d e f", "a b"], truncation="longest_first", max_length=4)["input_ids"]
    assert [row.count(END) for row in cut] == [1, 1] and [row[-1] for row in cut] == [END, END] and len(cut[0]) == 4
    pairs = tokenizer(["a b c d", "a"], ["e f", "g h i j"], truncation="longest_first", max_length=5)["input_ids"]
    assert [row.count(END) for row in pairs] == [2, 2]
    # The one thing a tokenizer cannot mend: an end that the text itself spells out.
    spelled = tokenizer(["a </s> b", "c d"], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match="same number of <eos> tokens"):
        loaded.model(**spelled)


@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_an_encoder_decoder_needs_a_tokenizer_that_ends_texts(model_type: str, tmp_path: Path) -> None:
    folder = save(tmp_path, model_type, tokenizer_of(ends=False))
    with pytest.raises(ConfigError, match=rf"'{model_type}' reads the decoder at .*\(1\), but the tokenizer adds none.*--tokenizer_name"):
        load(folder)
    # Its language model needs none.
    assert load(folder, "AutoModelForSeq2SeqLM").new_parameters.names == ()
    tokenizer_of(pad_token="</s>").save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"but the tokenizer pads with it.*--tokenizer_name"):
        load(folder)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("gpt_neo", ["transformer.h.0.attn.attention.bias", "transformer.h.1.attn.attention.masked_bias"]),
        ("gptj", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("llama", ["model.layers.1.self_attn.rotary_emb.inv_freq"]),
        ("t5", ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]),
    ],
)
def test_tables_of_published_checkpoints_are_no_layers(model_type: str, names: list[str], tmp_path: Path) -> None:
    folder = save(tmp_path, model_type, tokenizer_of())
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: torch.ones(1) for name in names}, folder / "model.safetensors", metadata={"format": "pt"})
    head = "score" if model_type != "t5" else "classification_head"
    assert all(name.startswith(head) for name in load(folder).new_parameters.names)


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_layers_that_stay_in_float32_beside_float16(model_type: str, tmp_path: Path) -> None:
    # transformers keeps T5's `wo` in float32 when it loads float16; the adapter behind it follows.
    folder = save(tmp_path, model_type, tokenizer_of())
    config = ModelConfig(model_name_or_path=str(folder))
    model = load_backbone(config, auto_class=CLASSIFIER, options=OPTIONS, seed=0, dtype=torch.float16).model
    info = adapt(model, AdapterConfig(bottleneck_dim=8), seed=0)
    for site in info.sites:
        layer = model.get_submodule(site)
        assert {parameter.dtype for parameter in layer.parameters()} == {model.get_parameter(f"{site}.base_layer.weight").dtype}
    input_ids = torch.tensor([[5, 6, END], [7, 8, END]])
    assert model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.isfinite().all()
