"""Which tokens of a window are the answer."""

from collections.abc import Sequence

import numpy as np

from adakron.data.encoding import TokenTable
from adakron.data.windows import CONTEXT, NULL


def answer_positions(table: TokenTable, answers: Sequence[Sequence[str]], starts: Sequence[Sequence[int]]) -> np.ndarray:
    """(windows, 2) int64: first and last token of the question's first answer, counted from the window's start.

    Both are the null token where the window does not hold the whole answer, and where there is none. Tokens that the answer shares
    with other text are part of it: an answer may begin or end inside of a word.
    """
    assert table.rows is not None
    positions = np.empty((len(table.rows), 2), dtype=np.int64)
    for window, row in enumerate(table.rows.tolist()):
        own = slice(table.offsets[window], table.offsets[window + 1])
        roles = table.features["roles"][own]
        positions[window] = np.argmax(roles == NULL)
        if not len(answers[row]):
            continue
        text, start = answers[row][0], starts[row][0]
        # White space around the answer belongs to no token.
        begin = start + len(text) - len(text.lstrip())
        end = start + len(text.rstrip())
        context = np.flatnonzero(roles == CONTEXT)
        if not len(context):
            continue
        first = int(context[0])
        begins, ends = (table.features[name][own][first : first + len(context)] for name in ("char_starts", "char_ends"))
        # At the edges of the context it may hold characters that no token stands for.
        at_start, at_end = window == 0 or table.rows[window - 1] != row, window + 1 == len(table.rows) or table.rows[window + 1] != row
        if (at_start or begins[0] <= begin) and (at_end or end <= ends[-1]):
            found = int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(begins, end, side="left")) - 1
            if found[0] <= found[1]:
                positions[window] = first + found[0], first + found[1]
    return positions
