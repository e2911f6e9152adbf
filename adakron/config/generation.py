"""Settings of a decoder."""

import math
from dataclasses import dataclass
from typing import Literal

from adakron.settings import Settings, flag, positive_problems

_LARGEST_DIVISOR = 30  # as a power of ten: what is far beyond makes zeros and infinities of fp32 scores, all alike
_LARGEST_PENALTY = 1e6  # likewise


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Settings):
    """Beam search. The defaults are the published ones for E2E (docs/decoding.md); lengths count generated tokens alone."""

    num_beams: int = flag(10, "Hypotheses that are kept for each prompt; 1 is greedy search.")
    length_penalty: float = flag(0.8, "A hypothesis scores its log-probability / its length to this power: larger favours longer ones.")
    no_repeat_ngram_size: int = flag(4, "No sequence of so many generated tokens comes twice in a text; 0 allows all.")
    repetition_penalty: float = flag(1.0, "Above 1: tokens that were generated already become less likely.")
    max_new_tokens: int = flag(64, "Longest text, in tokens, its end included.")
    min_new_tokens: int = flag(0, "No text ends before so many tokens.")
    early_stopping: Literal["never", "false", "true"] = flag(
        "false",
        "When a prompt's search ends: never before no better text can come, false where transformers' estimate says so, true with the"
        " first num_beams finished texts.",
    )
    eos_token_id: str | None = flag(
        None, "Numbers of further tokens that end a text, separated by commas, besides the tokenizer's end-of-sequence token."
    )

    @property
    def further_ends(self) -> tuple[int, ...]:
        """eos_token_id as numbers."""
        return tuple(int(part) for part in (self.eos_token_id or "").split(",") if part.strip())

    def problems(self) -> list[str]:
        found = positive_problems(self, "num_beams", "max_new_tokens")
        found += [
            f"{name} is {getattr(self, name)}; it must be at least 0 (set --{name})"
            for name in ("no_repeat_ngram_size", "min_new_tokens")
            if getattr(self, name) < 0
        ]
        if not math.isfinite(self.length_penalty):
            found.append(f"length_penalty is {self.length_penalty}; it must be a finite number (set --length_penalty)")
        elif abs(self.length_penalty) * math.log10(max(1, self.max_new_tokens)) > _LARGEST_DIVISOR:
            found.append(
                f"length_penalty is {self.length_penalty}; scores are divided by a length of up to {self.max_new_tokens} to this power, and"
                f" that must stay within 1e-{_LARGEST_DIVISOR} and 1e{_LARGEST_DIVISOR} (set --length_penalty nearer to 0)"
            )
        if not 1.0 / _LARGEST_PENALTY <= self.repetition_penalty <= _LARGEST_PENALTY:
            found.append(
                f"repetition_penalty is {self.repetition_penalty}; it must be a positive number from {1.0 / _LARGEST_PENALTY:g} to"
                f" {_LARGEST_PENALTY:g} (set --repetition_penalty)"
            )
        if self.min_new_tokens > self.max_new_tokens:
            found.append(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens}); lower one, or raise the other"
            )
        if self.eos_token_id is not None and not all(
            part.strip().isascii() and part.strip().isdigit() for part in self.eos_token_id.split(",")
        ):
            found.append(f"eos_token_id is {self.eos_token_id!r}; it must be token numbers separated by commas, such as 628 or 13,628")
        return found
