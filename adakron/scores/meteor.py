"""METEOR as nltk computes it (Lavie and Agarwal 2007), with WordNet's synonyms where a folder of nltk's data has WordNet.

This is not METEOR 1.5, the Java program behind published numbers: other weights, no paraphrase table, and the mean over texts
instead of one score from summed counts. docs/scores.md has both on the same texts.
"""

import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adakron.errors import DataError

NLTK_DATA = "NLTK_DATA"
"""nltk's own variable: folders with its data, separated as in PATH."""


class NoSynonyms:
    """Stands where nltk wants WordNet: no word has a synonym, so what matches are equal words and equal stems."""

    def synsets(self, word: str) -> list[Any]:
        """Nothing."""
        return []


def find_wordnet(folder: str | Path | None) -> Any | None:
    """nltk's reader of the WordNet in an nltk data folder: the given one, else those of NLTK_DATA; None where neither has it.

    Nothing is downloaded. Raises DataError where a given folder has no WordNet, or one that cannot be read.
    """
    if folder is not None:
        reader = _reader(str(Path(folder).resolve()))
        if reader is None:
            raise DataError(
                f"{folder} has no corpora/wordnet or corpora/wordnet.zip; name a folder that `python -m nltk.downloader -d FOLDER wordnet`"
                " filled, or leave it out for METEOR without synonyms"
            )
        return reader
    readers = (_reader(place) for place in os.environ.get(NLTK_DATA, "").split(os.pathsep) if place)
    return next((reader for reader in readers if reader is not None), None)


@functools.cache
def _reader(folder: str) -> Any | None:
    import nltk
    from nltk.corpus.reader import WordNetCorpusReader

    try:
        place = nltk.data.find("corpora/wordnet", paths=[folder])
    except LookupError:
        try:
            place = nltk.data.find("corpora/wordnet.zip/wordnet/", paths=[folder])
        except LookupError:
            return None
    if folder not in nltk.data.path:
        nltk.data.path.append(folder)  # nltk opens no file outside these
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        try:
            reader = WordNetCorpusReader(place, None)
        except (LookupError, OSError, ValueError, AssertionError) as error:
            raise DataError(f"the WordNet in {folder} cannot be read ({error}); fetch it again, or leave it out") from error
    return _CachedSynonyms(reader)


class _CachedSynonyms:
    """nltk's reader, asked once per word."""

    def __init__(self, reader: Any):
        self.synsets = functools.cache(reader.synsets)


def meteor(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], synonyms: Any | None) -> float:
    """The mean over tokenised hypotheses of the best reference's METEOR; 0 to 1, case ignored.

    synonyms: what `find_wordnet` found; without it a match is an equal word or an equal stem (Porter's).
    """
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import meteor_score

    # nltk stems every word of every pair again.
    stemmer = PorterStemmer()
    stemmer.stem = functools.cache(stemmer.stem)
    wordnet = NoSynonyms() if synonyms is None else synonyms
    scores = [
        meteor_score(group, hypothesis, stemmer=stemmer, wordnet=wordnet) for hypothesis, group in zip(hypotheses, references, strict=True)
    ]
    return float(sum(scores) / len(scores))
