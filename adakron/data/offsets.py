"""Where tokens stand in their text. Tokenizers of several kinds count the space before a word as part of its token."""

import unicodedata

import numpy as np
from transformers import PreTrainedTokenizerBase

from adakron.errors import ConfigError

_SPACES = np.array([chr(code).isspace() for code in range(0x3001)])
"""All white space of Unicode lies below."""


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError where the tokenizer cannot say which characters its tokens stand for."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} is a slow one, which does not say where its tokens stand in the text; this task"
            " needs a fast one: a folder or hub id with a tokenizer.json (set --tokenizer_name or --model_name_or_path)"
        )


def trimmed(text: str, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token spans [start, end) of a text without the white space at their edges; of a token of white space alone, an empty span.

    RoBERTa's tokenizers may trim by themselves; DeBERTa-v3's, GPT-2's and others made of SentencePiece or bytes do not.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    word = ~_SPACES[np.minimum(codes, len(_SPACES) - 1)] | (codes >= len(_SPACES))
    places = np.arange(len(codes), dtype=np.int64)
    # next_word[i]: the first character from i on that is no space; after_word[i]: one behind the last such before i.
    next_word = np.minimum.accumulate(np.append(np.where(word, places, len(codes)), len(codes))[::-1])[::-1]
    after_word = np.maximum.accumulate(np.insert(np.where(word, places + 1, 0), 0, 0))
    first = np.minimum(next_word[starts], ends)
    return first, np.maximum(after_word[ends], first)


def with_marks(text: str, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The ends of token spans [start, end) with the combining marks (accents) that stand behind a token and belong to no other one.

    Tokenizers that take accents off (BERT's for lower case) leave them out of their tokens where they are characters of their own.
    """
    if text.isascii():
        return ends
    marks = np.fromiter((unicodedata.category(letter) == "Mn" for letter in text), dtype=bool, count=len(text))
    places = np.append(np.where(marks, len(text), np.arange(len(text))), len(text))
    after_marks = np.minimum.accumulate(places[::-1])[::-1]  # [i]: the first character from i on that is no mark
    reached = np.minimum(after_marks[ends], np.append(starts[1:], len(text)))
    return np.where(ends > starts, np.maximum(ends, reached), ends)
