"""Our scores beside the programs behind published numbers, on the E2E test set: the first human text of each meaning representation that
has several is the hypothesis, the others are its references.

    pip install --no-deps --target DIR pycocoevalcap pyter3
    PYTHONPATH=DIR:. python -m tests.benchmarks.scores E2E_TEST.jsonl [--wordnet NLTK_DATA_FOLDER]

pycocoevalcap carries METEOR 1.5 and the Stanford tokenizer, which need Java; without it those lines are left out.
"""

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from adakron.scores import score_texts
from adakron.scores.cider import cider
from adakron.scores.corpus import Corpus
from adakron.scores.libraries import rouge_l
from adakron.scores.profiles import find_profile
from adakron.scores.ter import mean_ter


def human_texts(path: str) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and references of the comparison."""
    groups: dict[str, list[str]] = defaultdict(list)
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            groups[row["meaning_representation"]].append(" ".join(row["human_reference"].split()))
    several = [texts for texts in groups.values() if len(texts) > 1]
    return [texts[0] for texts in several], [texts[1:] for texts in several]


def caption_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]], java: bool) -> dict[str, float]:
    """What the caption evaluation makes of the same words, and with Java of its own words, METEOR 1.5 included."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    corpus = Corpus(hypotheses, references, find_profile("e2e"))
    gts = {str(i): [" ".join(words) for words in segment.reference_words] for i, segment in enumerate(corpus.segments)}
    res = {str(i): [" ".join(segment.words)] for i, segment in enumerate(corpus.segments)}
    scores = {
        "rouge_l, our words": 100 * float(Rouge().compute_score(gts, res)[0]),
        "cider, our words": float(Cider().compute_score(gts, res)[0]),
    }
    if java:
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        cut = PTBTokenizer()
        gts = cut.tokenize({str(i): [{"caption": text} for text in group] for i, group in enumerate(references)})
        res = cut.tokenize({str(i): [{"caption": text}] for i, text in enumerate(hypotheses)})
        # The Stanford tokenizer writes # for a pound sign.
        pairs = [(gts[str(i)], [" ".join(words).replace("£", "#") for words in s.reference_words]) for i, s in enumerate(corpus.segments)]
        same = sum(one == other for group in pairs for one, other in zip(*group, strict=True))
        print(f"references with the Stanford tokenizer's very words: {same:,} of {sum(map(len, references)):,}")
        scores |= {
            "rouge_l, Stanford's words": 100 * float(Rouge().compute_score(gts, res)[0]),
            "cider, Stanford's words": float(Cider().compute_score(gts, res)[0]),
            "METEOR 1.5, Stanford's words": 100 * float(Meteor().compute_score(gts, res)[0]),
        }
    return scores


def main() -> None:
    """Print both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test_file")
    parser.add_argument("--wordnet")
    options = parser.parse_args()
    hypotheses, references = human_texts(options.test_file)
    print(f"{len(hypotheses)} hypotheses, {sum(map(len, references)):,} references")
    for profile in ("e2e", "webnlg", "plain"):
        began = time.process_time()
        scores = score_texts(hypotheses, references, profile=profile, wordnet=options.wordnet)
        show(f"ours, {profile} ({time.process_time() - began:.1f} s)", scores)
    show("caption evaluation", caption_scores(hypotheses, references, shutil.which("java") is not None))
    corpus = Corpus(hypotheses, references, find_profile("e2e"))
    words, reference_words = [s.words for s in corpus.segments], [s.reference_words for s in corpus.segments]
    show("ours again", {"rouge_l": rouge_l(corpus), "cider": cider(words, reference_words)})
    import pyter

    few = slice(0, 60)
    rates = [min(pyter.ter(h, r) for r in group) for h, group in zip(words[few], reference_words[few], strict=True)]
    show("first 60, mean TER", {"pyter": 100 * sum(rates) / len(rates), "ours": 100 * mean_ter(words[few], reference_words[few])})


def show(title: str, scores: dict[str, Any]) -> None:
    """One line of scores."""
    print(f"{title}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()), flush=True)


if __name__ == "__main__":
    main()
