"""What a generation task gives to a decoder: one prompt per distinct source, with all its references."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prompts:
    """The prompts of a split, stored flat: prompt i is `input_ids[offsets[i]:offsets[i + 1]]`; they are in order of first appearance.

    input_ids: 1-D int32 array over all prompts: the source's tokens and the token that ends a source, nothing of a target.
    offsets: (prompts + 1,) int64.
    references: for each prompt all its references, in the data's order, as they were written.
    sources: for each prompt the source as a readable text, without special tokens.
    categories: for each prompt the part of the split that scores are reported for beside the whole (WebNLG: "seen", "unseen");
        None where the data has no such parts.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    references: list[list[str]]
    sources: list[str]
    categories: list[str] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def prompt(self, index: int) -> np.ndarray:
        """The tokens of one prompt."""
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]]
