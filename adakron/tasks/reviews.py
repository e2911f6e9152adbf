"""The text of the quickstart task: short reviews whose sentiment hangs on syntax, written by a seeded grammar.

What a review praises or blames is its item ("the film"); the clauses about an aspect ("the acting"), about other people's
opinions or about the day it happened carry sentiment words too, and do not decide. The structure of a review is drawn
independently of its label, and about as many sentences turn their sentiment word round (negation, reported opinions
rejected, things that might have been) as use it straight, so counting words says little.
"""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from adakron.tasks.review_words import DOMAINS, MILD, STRONG, Domain

_T = TypeVar("_T")
Review = tuple[str, int]
"""A sentence or two, and 1 for a positive or 0 for a negative review."""

STRAIGHT = 0.75
"""Share of the judging clauses that use their adjective straight; the others negate the opposite one."""

HELD_OUT = 4
"""One pair of template and domain in so many never occurs in training, and makes half of validation and test."""

_NOT_GRADABLE = ("not", "hardly", "by no means", "anything but", "far from", "not exactly")
_NOT = (*_NOT_GRADABLE, "not very", "never", "not at all", "not in the least", "not particularly", "scarcely")
_DEGREES = ("", "", "", "really", "truly", "quite", "rather", "very", "remarkably", "somewhat", "decidedly", "fairly")
_DEGREES_BAD = (*_DEGREES, "a little", "slightly", "a bit")
_DEGREES_STRONG = ("", "", "", "really", "truly", "quite", "simply", "absolutely")


class Writer:
    """One review's choices: a domain, a tense, and a source of random numbers.

    Only `Random.random` is used: its stream is promised for a seed in every Python version, that of `choice` is not.
    """

    def __init__(self, rng: random.Random, domain: Domain):
        self.rng = rng
        self.domain = domain
        self.past = self.chance(0.5)
        self.noun = self.pick(domain.nouns)
        self.used: set[str] = set()

    def pick(self, options: Sequence[_T]) -> _T:
        """One of the options, all equally likely."""
        return options[int(self.rng.random() * len(options))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def word(self, good: bool, *, strong: bool | None = None, aspect: bool = False) -> str:
        """An adjective for the item (or one of its aspects), not used in this review before."""
        if strong is None:
            strong = self.chance(0.35)
        words = STRONG[good] if strong else MILD[good] if aspect else MILD[good] + self.domain.mild[good]
        fresh = [word for word in words if word not in self.used]
        chosen = self.pick(fresh)
        self.used.add(chosen)
        return chosen

    def degree_word(self, good: bool, *, aspect: bool = False) -> str:
        """An adjective, often with an intensifier or diminisher, which never turns it round."""
        strong = self.chance(0.35)
        degree = self.pick(_DEGREES_STRONG if strong else _DEGREES if good else _DEGREES_BAD)
        return f"{degree} {self.word(good, strong=strong, aspect=aspect)}".strip()

    def predicate(self, good: bool, *, aspect: bool = False) -> str:
        """What follows "is": a straight adjective, or the opposite one negated."""
        if self.chance(STRAIGHT):
            return self.degree_word(good, aspect=aspect)
        strong = self.chance(0.35)
        return f"{self.pick(_NOT_GRADABLE if strong else _NOT)} {self.word(not good, strong=strong, aspect=aspect)}"

    def be(self, plural: bool = False) -> str:
        """The verb of this review's tense."""
        return (("was", "were") if self.past else ("is", "are"))[plural]

    def item(self) -> str:
        """What is reviewed, as a noun phrase."""
        return f"{self.pick(('the', 'this'))} {self.noun}"

    def a(self, good: bool) -> str:
        """An indefinite noun phrase for the item with an adjective, "an awful film"."""
        return with_article(f"{self.word(good)} {self.noun}")

    def says(self, good: bool) -> str:
        """A clause that judges the item."""
        return f"{self.item()} {self.be()} {self.predicate(good)}"

    def aspect_says(self, good: bool) -> str:
        """A clause that judges an aspect of the item."""
        aspect, plural = self.pick(self.domain.aspects)
        return f"{aspect} {self.be(plural)} {self.predicate(good, aspect=True)}"


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an"; good for the words of this grammar, which has no "hour" or "useful"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


_OTHERS = (
    "the man next to me", "my sister", "my neighbour", "a colleague of mine", "my brother", "an old friend", "my aunt", "our critic",
)  # fmt: skip

Template = Callable[[Writer, bool], str]

# (share of the reviews, templates that share it equally), each template (writer, label) -> sentence. `not good` words stand
# where the sentence turns them round or where its main clause overrules them.
_TEMPLATE_GROUPS: tuple[tuple[float, tuple[Template, ...]], ...] = (
    # a judgement, straight or negated
    (0.3, (
        lambda w, good: w.says(good),
        lambda w, good: f"I found {w.item()} {w.predicate(good)}",
        lambda w, good: f"all in all, {w.says(good)}",
        lambda w, good: f"this {w.be()} {w.a(good)}",
    )),
    # negation that reaches the adjective
    (0.15, (
        lambda w, good: f"I never found {w.item()} {w.word(not good)}",
        lambda w, good: f"I would not call {w.item()} {w.word(not good)}",
        lambda w, good: f"nobody could call {w.item()} {w.word(not good)}",
        lambda w, good: f"I cannot say that {w.item()} {w.be()} {w.word(not good)}",
    )),
    # negation that does not
    (0.15, (
        lambda w, good: f"I have never {w.domain.met} such {w.a(good)}",
        lambda w, good: f"nobody will forget how {w.word(good)} {w.item()} {w.be()}",
        lambda w, good: f"not only {w.be()} {w.item()} {w.word(good)}, it {w.be()} also {w.word(good)}",
        lambda w, good: f"I have no doubt that {w.item()} {w.be()} {w.degree_word(good)}",
    )),
    # contrast: the main clause, about the item, decides
    (0.25, (
        lambda w, good: f"although {w.aspect_says(not good)}, {w.says(good)}",
        lambda w, good: f"even though {w.aspect_says(not good)}, {w.says(good)}",
        lambda w, good: f"{w.aspect_says(not good)}, but {w.says(good)}",
        lambda w, good: f"{w.says(good)}, although {w.aspect_says(not good)}",
        lambda w, good: f"at first {w.item()} seemed {w.degree_word(not good)}, but in the end it {w.be()} {w.predicate(good)}",
    )),
    # other people's opinions, other things of the kind
    (0.15, (
        lambda w, good: f"{w.pick(_OTHERS)} {'hated' if good else 'loved'} it, but I found {w.item()} {w.predicate(good)}",
        lambda w, good: f"{w.pick(_OTHERS)} {'loved' if good else 'hated'} it too, and {w.says(good)}",
        lambda w, good: f"unlike {w.domain.previous}, which was {w.word(not good)}, {w.says(good)}",
        lambda w, good: f"like {w.domain.previous}, {w.item()} {w.be()} {w.degree_word(good)}",
    )),
)  # fmt: skip

# Sentences that say nothing about the item; {} is a sentiment word of either kind.
_ASIDES = (
    "The weather was {} that day.", "I had {a} week at work.", "We had {a} journey there.", "My new shoes are {}, by the way.",
    "I was in {a} mood that evening.", "Our neighbour is {a} cook.", "The coffee at the station was {}.",
)  # fmt: skip
_ASIDE_WORDS = {True: ("lovely", "wonderful", "excellent", "superb"), False: ("dreadful", "awful", "terrible", "dismal")}


def _review(writer: Writer, template: Template, good: bool) -> str:
    sentence = template(writer, good)
    text = f"{sentence[0].upper()}{sentence[1:]}."
    if writer.chance(0.15):
        word = writer.pick(_ASIDE_WORDS[writer.chance(0.5)])
        aside = writer.pick(_ASIDES).replace("{}", word).replace("{a}", with_article(word))
    elif writer.chance(0.2):
        aside = writer.pick(writer.domain.notes)
    else:
        return text
    return f"{aside} {text}" if writer.chance(0.5) else f"{text} {aside}"


def write_reviews(seed: int, train: int, held_out: Sequence[int]) -> list[list[Review]]:
    """The training reviews, then one list per size in held_out; the same on every platform for the same arguments.

    No text occurs twice, in one list or in two. Every list has as many positive as negative reviews (one more negative
    where its size is odd). Every second pair of reviews of a held-out list is written with a template and domain that
    never meet in training.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    lists = []
    for number, size in enumerate((train, *held_out)):
        reviews: list[Review] = []
        while len(reviews) < size:
            label = len(reviews) % 2
            template, domain = _combination(rng, new=bool(number) and len(reviews) % 4 >= 2)
            text = _review(Writer(rng, DOMAINS[domain]), template, bool(label))
            if text not in seen:
                seen.add(text)
                reviews.append((text, label))
        lists.append(reviews)
    return lists


def _combination(rng: random.Random, new: bool) -> tuple[Template, int]:
    """A template and the index of a domain, of the combinations that training has or (new) of those it never has."""
    while True:
        ticket, group = rng.random(), 0
        while ticket >= _TEMPLATE_GROUPS[group][0] and group < len(_TEMPLATE_GROUPS) - 1:
            ticket -= _TEMPLATE_GROUPS[group][0]
            group += 1
        templates = _TEMPLATE_GROUPS[group][1]
        number, domain = int(rng.random() * len(templates)), int(rng.random() * len(DOMAINS))
        if ((group + number + domain) % HELD_OUT == 0) == new:
            return templates[number], domain
