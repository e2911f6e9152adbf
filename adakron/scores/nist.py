"""NIST, the information-weighted relative of BLEU (Doddington 2002, "Automatic evaluation of machine translation quality using n-gram
co-occurrence statistics", equations 2 and 3), for several references as mteval has it.

nltk's `corpus_nist` is not used: with several references it takes one reference per hypothesis and order, and the length of that,
where mteval counts a match in any of them and compares with their average length; an empty hypothesis can divide by zero there.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain

ORDER = 5
_BETA = math.log(0.5) / math.log(1.5) ** 2  # the length factor is one half where the output has two thirds of the references' length

Ngram = tuple[str, ...]


def ngrams(tokens: Sequence[str], order: int) -> Counter[Ngram]:
    """How often each run of `order` tokens occurs."""
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def nist(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """The NIST score of tokenised hypotheses, each with its list of tokenised references; 0 is worst, there is no upper bound.

    info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn)), counted in all references; of the empty n-gram the count is that of words.
    """
    counts: Counter[Ngram] = Counter()
    for reference in chain.from_iterable(references):
        counts[()] += len(reference)
        for order in range(1, ORDER + 1):
            counts.update(ngrams(reference, order))
    score = 0.0
    for order in range(1, ORDER + 1):
        information, total = 0.0, 0
        for hypothesis, group in zip(hypotheses, references, strict=True):
            found = ngrams(hypothesis, order)
            total += found.total()
            allowed: Counter[Ngram] = Counter()
            for reference in group:
                allowed |= ngrams(reference, order)
            information += sum(times * math.log2(counts[ngram[:-1]] / counts[ngram]) for ngram, times in (found & allowed).items())
        score += information / total if total else 0.0
    output = sum(map(len, hypotheses))
    expected = sum(sum(map(len, group)) / len(group) for group in references)
    if output >= expected:
        return score
    return score * math.exp(_BETA * math.log(output / expected) ** 2) if output else 0.0
