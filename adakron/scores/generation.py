"""BLEU, NIST, METEOR, ROUGE-L, CIDEr, TER and chrF++ of generated texts, each with one or more references. docs/scores.md."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate

from adakron.errors import ConfigError, DataError
from adakron.scores.cider import cider
from adakron.scores.corpus import Corpus
from adakron.scores.libraries import bleu, chrf, rouge_l
from adakron.scores.meteor import find_wordnet, meteor
from adakron.scores.metric import LocalMetric
from adakron.scores.nist import nist
from adakron.scores.profiles import find_profile
from adakron.scores.ter import corpus_ter, mean_ter

_PACKAGES = {"sacrebleu": "sacrebleu", "nltk": "nltk", "rouge_score": "rouge-score"}


def score_texts(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    profile: str = "plain",
    categories: Sequence[str] | None = None,
    wordnet: str | Path | None = None,
) -> dict[str, float]:
    """The scores of hypotheses, each with its list of references.

    profile: one of `adakron.scores.profiles.PROFILES`, the preparation of texts and the forms of scores of a task.
    categories: one name per hypothesis; all scores of a category's texts alone are added, with `_<category>` behind their names.
    wordnet: an nltk data folder with WordNet, for METEOR's synonyms; default: the folders of NLTK_DATA.

    Returns bleu, meteor, rouge_l, ter and chrf++ in percent, nist and cider (0 to 10) as they are; ter is best at 0, the others
    are best when high. Without WordNet METEOR matches equal words and stems only and is called `meteor_exact_stem`.
    Raises ConfigError for an unknown profile and where sacrebleu, nltk or rouge-score is not installed; DataError where counts
    differ, a hypothesis has no reference with text, or the folder holds no WordNet.
    """
    chosen = find_profile(profile)
    require_packages()
    if categories is not None and len(categories) != len(hypotheses):
        raise DataError(f"{len(categories):,} categories for {len(hypotheses):,} hypotheses; give one for each")
    corpus = Corpus(hypotheses, references, chosen)
    synonyms = find_wordnet(wordnet)
    scores = _score(corpus, synonyms)
    for category in dict.fromkeys(categories or ()):
        positions = [position for position, name in enumerate(categories or ()) if name == category]
        scores |= {f"{name}_{category}": value for name, value in _score(corpus.subset(positions), synonyms).items()}
    return scores


def require_packages() -> None:
    """Raises ConfigError with the command that installs what is missing."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"scores of generated texts need {', '.join(missing)}, not installed; pip install 'adakron[nlg]'")


def _score(corpus: Corpus, synonyms: Any | None) -> dict[str, float]:
    tokens = [segment.tokens for segment in corpus.segments]
    reference_tokens = [segment.reference_tokens for segment in corpus.segments]
    words = [segment.words for segment in corpus.segments]
    reference_words = [segment.reference_words for segment in corpus.segments]
    return {
        "bleu": bleu(corpus),
        "nist": nist(tokens, reference_tokens),
        "meteor_exact_stem" if synonyms is None else "meteor": 100.0 * meteor(words, reference_words, synonyms),
        "rouge_l": rouge_l(corpus),
        "cider": cider(words, reference_words),
        "ter": 100.0 * (mean_ter if corpus.profile.ter_per_text else corpus_ter)(words, reference_words),
        "chrf++": chrf(corpus),
    }


class GenerationScore(LocalMetric):
    """`score_texts` as an `evaluate` module; `config_name` is a profile.

    `compute(predictions=texts, references=lists of texts)` returns what `score_texts` does; `categories` and `wordnet` may be given.
    """

    def __init__(self, config_name: str = "plain"):
        find_profile(config_name)
        require_packages()
        super().__init__(config_name)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BLEU, NIST, METEOR, ROUGE-L, CIDEr, TER and chrF++ of generated texts with several references.",
            citation="",
            inputs_description=GenerationScore.__doc__ or "",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        categories: Sequence[str] | None = None,
        wordnet: str | Path | None = None,
    ) -> dict[str, float]:
        return score_texts(predictions, references, profile=self.config_name, categories=categories, wordnet=wordnet)
