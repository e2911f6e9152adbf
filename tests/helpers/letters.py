"""A tokenizer with one token per letter, for tests that need to see every token."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij")


def letter_tokenizer(*, special: bool = True, vocabulary: Sequence[str] = VOCABULARY, **options: Any) -> PreTrainedTokenizerFast:
    """Splits at blanks and numbers words as `vocabulary` does; special: with [CLS] and [SEP] as BERT places them."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(names | options))
