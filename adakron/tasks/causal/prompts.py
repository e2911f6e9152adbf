"""What a generation task gives to a decoder: one prompt per distinct source, with all its references."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from adakron.data.encoding import encode_pieces
from adakron.tasks.causal.sequences import join_prompts, marks_of


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


def prompts_of(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """A prompt for every source, in the form in which the model reads sources; without references."""
    pieces = encode_pieces(datasets.Dataset.from_dict({"source": list(sources)}), "source", tokenizer)
    tokens, offsets = join_prompts(pieces, marks_of(tokenizer))
    return Prompts(tokens, offsets, [[] for _ in sources], list(sources))
