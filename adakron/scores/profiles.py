"""How the texts of a task are prepared for its published scores, and which form of a score is meant (docs/scores.md has the sources)."""

from dataclasses import dataclass
from typing import Literal

from adakron.errors import ConfigError

WordRule = Literal["mteval", "treebank", "caption"]
"""`adakron.scores.words`: which words METEOR, ROUGE-L, CIDEr and TER see. BLEU and NIST always see mteval's."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The conventions of one task. All scores get the same prepared text; sources in docs/scores.md."""

    name: str
    lowercase: bool
    """Texts are lower-cased before everything else."""
    split_punctuation: bool = False
    """Texts are split around every character that is no letter, digit or underscore before everything else."""
    case_in_tokens: bool = True
    """Whether the tokens of BLEU and NIST keep their case."""
    max_references: int | None = None
    """References beyond this many of one text are left out; None keeps all."""
    words: WordRule
    smooth_bleu: bool = False
    """sacrebleu's exponential smoothing where no n-gram of some order matches; without it BLEU is 0 there."""
    rouge_beta: float | None = None
    """None: ROUGE-L is the best F1 over the references. Else the F measure, recall weighted by beta, of best precision and best recall."""
    ter_per_text: bool = False
    """TER as the mean over texts of the best reference's rate; else edits over average reference length, both summed over the corpus."""


def _triples(name: str) -> Profile:
    # The published WebNLG and DART numbers come from one pipeline.
    return Profile(name=name, lowercase=True, split_punctuation=True, max_references=6, words="treebank", ter_per_text=True)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="plain", lowercase=False, words="mteval", smooth_bleu=True),
        Profile(name="e2e", lowercase=False, case_in_tokens=False, words="caption", rouge_beta=1.2),
        _triples("webnlg"),
        _triples("dart"),
    )
}


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises ConfigError for an unknown one."""
    if name not in PROFILES:
        raise ConfigError(f"profile is {name!r}; it must be one of {', '.join(PROFILES)}")
    return PROFILES[name]
