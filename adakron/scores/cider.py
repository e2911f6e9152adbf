"""CIDEr-D (Vedantam, Zitnick and Parikh 2015, "CIDEr: consensus-based image description evaluation", section 5: equations of CIDEr
and of its robust form CIDEr-D): how alike the TF-IDF vectors of a hypothesis' n-grams and its references' are.

What captioning and the E2E challenge publish as "CIDEr" is this form, with the number of an n-gram in the text as its term frequency
(the paper divides it by the text's n-grams, which clipping makes a difference).
"""

import math
from collections import Counter
from collections.abc import Sequence

from adakron.scores.nist import Ngram, ngrams

ORDER = 4
SIGMA = 6.0  # words: what a difference in length costs, from the paper
_SCALE = 10.0  # from the paper's CIDEr-D

Vectors = list[dict[Ngram, float]]


def cider(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """The mean CIDEr-D of tokenised hypotheses, each with its list of tokenised references; from 0 to 10.

    An n-gram weighs log(segments / segments with it in a reference), so one that all segments have weighs nothing: the score of a
    single segment is 0, and scores of corpora of different sizes do not compare.
    """
    documents: Counter[Ngram] = Counter()
    for group in references:
        documents.update({ngram for reference in group for order in range(1, ORDER + 1) for ngram in ngrams(reference, order)})
    total = math.log(len(references))

    def vectors(words: Sequence[str]) -> Vectors:
        return [
            {ngram: times * (total - math.log(max(1, documents[ngram]))) for ngram, times in ngrams(words, order).items()}
            for order in range(1, ORDER + 1)
        ]

    scores = []
    for hypothesis, group in zip(hypotheses, references, strict=True):
        mine = vectors(hypothesis)
        similar = 0.0
        for reference in group:
            length = math.exp(-((len(hypothesis) - len(reference)) ** 2) / (2 * SIGMA**2))
            similar += length * sum(map(_clipped_cosine, mine, vectors(reference))) / ORDER
        scores.append(_SCALE * similar / len(group))
    return sum(scores) / len(scores)


def _clipped_cosine(hypothesis: dict[Ngram, float], reference: dict[Ngram, float]) -> float:
    """The cosine of two vectors of one order, an entry of the hypothesis counting for no more than the reference's."""
    product = sum(min(weight, reference.get(ngram, 0.0)) * reference.get(ngram, 0.0) for ngram, weight in hypothesis.items())
    norm = math.sqrt(sum(weight**2 for weight in hypothesis.values()) * sum(weight**2 for weight in reference.values()))
    return product / norm if norm else 0.0
