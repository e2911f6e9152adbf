"""Words of a text, in the ways that the published scores cut them. All take a text and return a list of words; needs nltk, sacrebleu."""

import re
from collections.abc import Callable
from functools import cache

from adakron.scores.profiles import WordRule

_NO_WORD = re.compile(r"(\W)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_CURRENCY = re.compile(r"([£€¥])")

# What the caption evaluation drops: the punctuation of the Penn Treebank, brackets under its names.
_PUNCTUATION = frozenset(["''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"])


def split_punctuation(text: str) -> str:
    """The text with a space around every character that is no letter, digit or underscore, and single spaces."""
    return " ".join(_NO_WORD.sub(r" \1 ", text).split())


@cache
def word_rule(rule: WordRule) -> Callable[[str], list[str]]:
    """The function that cuts a text into words.

    mteval: that of mteval-v13a, as sacrebleu has it. treebank: that of nltk's word tokenizer, for a text of one sentence.
    caption: the Penn Treebank's, sentence by sentence, lower-cased and without punctuation, as the caption evaluation has it.
    """
    if rule == "mteval":
        return _mteval()
    return _treebank() if rule == "treebank" else _caption()


def _mteval() -> Callable[[str], list[str]]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer = Tokenizer13a()
    return lambda text: tokenizer(text).split()


def _treebank() -> Callable[[str], list[str]]:
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return lambda text: list(tokenizer.tokenize(text))


def _caption() -> Callable[[str], list[str]]:
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()

    def cut(text: str) -> list[str]:
        # nltk's rules take a full stop off at the end of the text only, and leave £, € and ¥ at the number.
        sentences = _SENTENCE_END.split(_CURRENCY.sub(r" \1 ", text))
        words = (word.lower() for sentence in sentences for word in tokenizer.tokenize(sentence, convert_parentheses=True))
        return [word for word in words if word not in _PUNCTUATION]

    return cut
