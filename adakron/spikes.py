"""How far a step's loss stands above the steps before it: a metric, so that a spike can be found among thousands of steps.

The modified z-score of Iglewicz and Hoaglin (How to Detect and Handle Outliers, ASQC Quality Press, 1993):

    0.6745 (loss - median) / MAD,    MAD the median of |loss - median| over the window

which, unlike mean and standard deviation, a former spike in the window hardly moves. They call values above 3.5 outliers.
"""

from collections import deque
from collections.abc import Collection, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from adakron import distributed
from adakron.metrics import on_host

WINDOW = 64
"""Steps that a step is compared with, at most."""

FEWEST = 16
"""Steps before it that a step needs to be compared; until then its score is 0."""

_SMALLEST_MAD = 1e-3
"""Of the median: a loss that stood still for a while would make any step a spike."""


class LossSpikes:
    """Scores every step's loss; ranks and host meet once per interval, in `flush`."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._pending: list[Tensor] = []

    def record(self, share: Tensor) -> None:
        """This rank's share of a step's loss; the sum over ranks is the step's loss. Stays on its device."""
        self._pending.append(share.detach())

    def flush(self) -> float:
        """The highest score of the steps since the last flush, equal on all ranks. All ranks together; 0 where there was no step."""
        if not self._pending:
            return 0.0
        losses = distributed.all_reduce_sum(on_host(self._pending))
        self._pending.clear()
        return max(self._score(loss) for loss in losses.tolist())

    def _score(self, loss: float) -> float:
        score = modified_z_score(loss, self._window) if len(self._window) >= FEWEST else 0.0
        self._window.append(loss)
        return score

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on as if nothing had happened; pending is of this rank alone."""
        return {"window": list(self._window), "pending": on_host(self._pending).tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self._window = deque(state["window"], maxlen=WINDOW)
        self._pending = [torch.tensor(share, dtype=torch.float64) for share in state["pending"]]


def modified_z_score(value: float, window: Collection[float]) -> float:
    """See the module; with a floor under MAD where the window hardly varies."""
    middle = median(window)
    spread = max(median(abs(other - middle) for other in window), _SMALLEST_MAD * abs(middle), 1e-12)
    return 0.6745 * (value - middle) / spread
