"""Translation edit rate (Snover et al. 2006, "A study of translation edit rate with targeted human annotation"): how many words must be
inserted, deleted, replaced, or moved in runs, at one edit per run, to make a reference of a hypothesis.

The least number of edits is out of reach; the paper's greedy search makes the move that shortens the edit distance most, as long as
one does. Its rules are those of the reference program as sacrebleu documents and follows them, and the tests ask for sacrebleu's
counts. It is computed here because sacrebleu's edit distance, in Python word by word, takes minutes for 4,693 references: here one
is a few operations on integers per word (Hyyrö 2001, "Explaining and extending the bit-parallel approximate string matching
algorithm of Myers"), and a reference that cannot be the nearest is passed over.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

_LONGEST_RUN = 10
_FARTHEST_MOVE = 50
_MOST_MOVES = 1000  # tried for one pair of texts, as in sacrebleu

Move = tuple[int, int, int]
"""start, length, target: words[start : start + length] go to before words[target]."""


def corpus_ter(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """The edits to the nearest references over the references' mean lengths, both summed over the corpus; 0 is best, above 1 happens.

    hypotheses are lists of words, each with its list of references. Without any reference word it is 1, or 0 where nothing was written.
    """
    edits, length = 0.0, 0.0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        edits += _lowest(hypothesis, [(words, 1) for words in group])
        length += sum(map(len, group)) / len(group)
    return edits / length if length else float(edits > 0)


def mean_ter(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """The mean over texts of the lowest rate to a reference of theirs; arguments and range as for `corpus_ter`."""
    total = 0.0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        # To a reference without words every rate is 1, but for a hypothesis without words.
        total += _lowest(hypothesis, [(words, len(words) or len(hypothesis) or 1) for words in group])
    return total / len(hypotheses)


def _lowest(hypothesis: Sequence[str], group: Sequence[tuple[Sequence[str], int]]) -> float:
    """The lowest edits / divisor over references with their divisors."""
    # No edit brings more than one word nearer; a move brings none.
    bounds = [(max(len(hypothesis), len(words)) - (Counter(hypothesis) & Counter(words)).total()) / divisor for words, divisor in group]
    lowest = math.inf
    for bound, (words, divisor) in sorted(zip(bounds, group, strict=True), key=lambda pair: pair[0]):
        if bound >= lowest:
            break
        lowest = min(lowest, edits_between(hypothesis, words) / divisor)
    return lowest


def edits_between(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """The edits, moves included, that the greedy search finds from one list of words to another."""
    words, moves, tried = list(hypothesis), 0, 0
    if not reference:
        return len(words)
    distance = _Distance(reference)
    while True:
        best: tuple[int, int, int, int] | None = None
        before = distance(words)
        for start, length, target in _moves(words, reference):
            tried += 1
            # The greatest gain, then the longest run, then the earliest, then the nearest to the beginning.
            rank = (before - distance(_moved(words, (start, length, target))), length, -start, -target)
            best = rank if best is None else max(best, rank)
            if tried >= _MOST_MOVES:
                return moves + before
        if best is None or best[0] <= 0:
            return moves + before
        words = _moved(words, (-best[2], best[1], -best[3]))
        moves += 1


def _moved(words: list[str], move: Move) -> list[str]:
    start, length, target = move
    run, rest = words[start : start + length], words[:start] + words[start + length :]
    # Within the run a target counts from its beginning: the reference program's rule.
    place = target if target < start or target <= start + length else target - length
    return rest[:place] + run + rest[place:]


def _moves(words: Sequence[str], reference: Sequence[str]) -> Iterator[Move]:
    """Runs that the reference has elsewhere, where neither place is right already, and where they may go."""
    place, reference_wrong, wrong = _alignment(words, reference)
    for start in range(len(words)):
        for goal in range(max(0, start - _FARTHEST_MOVE), min(len(reference), start + _FARTHEST_MOVE + 1)):
            for length in range(1, _LONGEST_RUN + 1):
                if start + length > len(words) or goal + length > len(reference):
                    break
                if words[start + length - 1] != reference[goal + length - 1]:
                    break
                if not any(wrong[start : start + length]) or not any(reference_wrong[goal : goal + length]):
                    continue
                if start <= place[goal] < start + length:
                    continue
                targets = (0 if goal + offset < 0 else place[goal + offset] + 1 for offset in range(-1, length))
                yield from ((start, length, target) for target in dict.fromkeys(targets))


def _alignment(words: Sequence[str], reference: Sequence[str]) -> tuple[list[int], list[bool], list[bool]]:
    """A shortest edit of words into reference: at which word each reference word stands (behind which one, where it is inserted; -1:
    before all), which reference words are not met, and which words are not right. Prefers to keep or replace, then to delete.
    """
    rows = [list(range(len(reference) + 1))]
    for position, word in enumerate(words, start=1):
        above, row = rows[-1], [position]
        for column, other in enumerate(reference):
            row.append(min(above[column] + (word != other), above[column + 1] + 1, row[column] + 1))
        rows.append(row)
    place, reference_wrong, wrong = [-1] * len(reference), [True] * len(reference), [True] * len(words)
    row_index, column = len(words), len(reference)
    while row_index or column:
        here = rows[row_index][column]
        same = row_index > 0 and column > 0 and words[row_index - 1] == reference[column - 1]
        if row_index and column and rows[row_index - 1][column - 1] + (not same) == here:
            row_index, column = row_index - 1, column - 1
            place[column], reference_wrong[column], wrong[row_index] = row_index, not same, not same
        elif row_index and rows[row_index - 1][column] + 1 == here:
            row_index -= 1
        else:
            column -= 1
            place[column] = row_index - 1
    return place, reference_wrong, wrong


class _Distance:
    """The edit distance of lists of words to one reference, a column of the table in the bits of two integers."""

    def __init__(self, reference: Sequence[str]):
        self.length = len(reference)
        self.positions: dict[str, int] = {}
        for position, word in enumerate(reference):
            self.positions[word] = self.positions.get(word, 0) | 1 << position

    def __call__(self, words: Sequence[str]) -> int:
        everything, last = (1 << self.length) - 1, 1 << (self.length - 1)
        up, down, distance = everything, 0, self.length  # where the table rises and falls by one from row to row
        for word in words:
            match = self.positions.get(word, 0) | down
            diagonal = (((match & up) + up) ^ up) | match
            right, left = down | ~(diagonal | up), up & diagonal
            distance += bool(right & last) - bool(left & last)
            right, left = right << 1 | 1, left << 1
            up, down = (left | ~(diagonal | right)) & everything, right & diagonal & everything
        return distance
