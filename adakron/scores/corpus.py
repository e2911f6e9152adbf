"""Hypotheses with their references, checked once and prepared once for all scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from adakron.errors import DataError
from adakron.scores.profiles import Profile
from adakron.scores.words import split_punctuation, word_rule

Words = list[str]


@dataclass(frozen=True)
class Segment:
    """One hypothesis and its references (at least one): prepared texts, tokens for BLEU and NIST, words for the other scores."""

    hypothesis: str
    references: list[str]
    tokens: Words
    reference_tokens: list[Words]
    words: Words
    reference_words: list[Words]


class Corpus:
    """The texts of one evaluation under a profile.

    Raises DataError where counts differ, a text is none, a hypothesis has no reference that says something, or nothing is given.
    An empty reference beside others is left out: it says nothing, and would count as a reference of length 0.
    """

    def __init__(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]], profile: Profile):
        _check(hypotheses, references)
        self.profile = profile
        self.segments = [
            _prepared(hypothesis, [text for text in group if text.strip()], profile)
            for hypothesis, group in zip(hypotheses, references, strict=True)
        ]

    def subset(self, positions: Sequence[int]) -> "Corpus":
        """The corpus of some of its segments."""
        chosen = object.__new__(Corpus)
        chosen.profile = self.profile
        chosen.segments = [self.segments[position] for position in positions]
        return chosen


def _prepared(hypothesis: str, references: Sequence[str], profile: Profile) -> Segment:
    def text_of(text: str) -> str:
        text = text.lower() if profile.lowercase else text
        return split_punctuation(text) if profile.split_punctuation else text

    def tokens_of(text: str) -> Words:
        return word_rule("mteval")(text if profile.case_in_tokens else text.lower())

    hypothesis = text_of(hypothesis)
    kept = [text_of(reference) for reference in references[: profile.max_references]]
    cut = word_rule(profile.words)
    return Segment(hypothesis, kept, tokens_of(hypothesis), [*map(tokens_of, kept)], cut(hypothesis), [*map(cut, kept)])


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise DataError("hypotheses or references are one text; give a list of hypotheses and a list of lists of references")
    if len(hypotheses) != len(references):
        raise DataError(
            f"{len(hypotheses):,} hypotheses, but references for {len(references):,}; each hypothesis needs its list of references"
        )
    if not hypotheses:
        raise DataError("there are no hypotheses; give at least one text")
    for number, (hypothesis, group) in enumerate(zip(hypotheses, references, strict=True), start=1):
        if not isinstance(hypothesis, str):
            raise DataError(f"hypothesis {number:,} is {hypothesis!r:.60}, not a text")
        if isinstance(group, str):
            raise DataError(f"the references of hypothesis {number:,} are one text; they must be a list of texts, also where there is one")
        if not all(isinstance(text, str) for text in group):
            raise DataError(f"a reference of hypothesis {number:,} is no text; they must be a list of texts")
        if not any(text.strip() for text in group):
            raise DataError(f"hypothesis {number:,} has no reference that is not empty; give one, or leave the hypothesis out")
