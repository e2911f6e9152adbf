"""Tiny random models and data sets: for what does not depend on what a model knows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "cast",
    "is",
    "was",
    "not",
    "very",
    "quite",
    "good",
    "bad",
    "dull",
    "bright",
    "long",
    "short",
    "and",
    "but",
    "or",
    "it",
    "we",
    "they",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of WORDS that puts [CLS] before a text and [SEP] behind it."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def save_tiny_bert(
    folder: Path, *, dropout: float = 0.0, seed: int = 0, num_layers: int = 2, hidden_size: int = 32, positions: int = 64
) -> Path:
    """A random BERT with its own word-level tokenizer, as transformers saves them."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=positions, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder: Path) -> Path:
    """A random GPT-2 without dropout, with the same tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(SPECIAL + WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Random sentences of 2 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return file


def write_classification(folder: Path, *, train: int = 50, validation: int = 23, seed: int = 0) -> Path:
    """train.jsonl and validation.jsonl with columns sentence and label: whether "good" comes before any "bad"."""
    for split, count, offset in (("train", train, 0), ("validation", validation, 1), ("test", 5, 2)):
        rows: list[dict[str, Any]] = [
            {"sentence": text, "label": int("good" in text.split())} for text in sentences(count, seed * 10 + offset)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer without merges: every byte is a token, and <|end|> ends texts. It adds nothing by itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")


def save_byte_gpt2(folder: Path, *, n_positions: int = 128, std: float = 0.3, seed: int = 0) -> Path:
    """A random GPT-2 without dropout that reads bytes. std: of its weights; large ones make distributions that are not flat."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=n_positions, initializer_range=std, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
