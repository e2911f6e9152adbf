"""What this engine is to reach beside its peers, and whether a run of the suite found it reached."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from launch.contenders.tables import OURS, markdown_table, of_the_limit, ratio

Found = Callable[[Mapping[str, Any]], float | None]
"""A number from the result of a case; None where that was not measured."""

SST2, SST2_FP32, MRPC, ROBERTA = "sst2-minilm-bf16", "sst2-minilm-fp32", "mrpc-minilm-bf16", "sst2-roberta-base-bf16"
"""Names of the suite's cases."""


@dataclass(frozen=True)
class Target:
    """said: in words. case: where it is measured. limit: of what `found` returns; at_least: whether it is the smallest one allowed."""

    said: str
    case: str
    found: Found
    limit: float
    at_least: bool = True

    def judge(self, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """For JSON. results: by case. met: None where it was not measured."""
        measured = self.found(results[self.case]) if self.case in results else None
        met = None if measured is None else (measured >= self.limit if self.at_least else measured <= self.limit)
        return {
            "target": self.said, "case": self.case, "limit": self.limit, "at_least": self.at_least, "measured": measured, "met": met,
        }  # fmt: skip


def quotient(result: Mapping[str, Any], what: str, name: str, base: str) -> float | None:
    """Of two contenders' numbers by that name; None where one was not measured."""
    mine, other = (result["contenders"].get(one, {}).get(what) for one in (name, base))
    return mine / other if mine and other else None


TARGETS = (
    Target("times as fast as HF Trainer + PEFT LoRA", SST2, partial(ratio, name="hf_lora"), 2.5),
    Target("times as fast as the published procedure", SST2, partial(ratio, name="published"), 20.0),
    Target("times as fast as HF Trainer + PEFT LoRA", MRPC, partial(ratio, name="hf_lora"), 1.7),
    Target("times as fast as HF Trainer + PEFT LoRA", ROBERTA, partial(ratio, name="hf_lora"), 1.5),
    Target("of what matrix products reach, on useful tokens", ROBERTA, of_the_limit, 0.5),
    Target("times the plain loop's time with the same kernels", SST2, partial(ratio, name=OURS, base="plain_fast"), 1.03, at_least=False),
    Target(
        "times the plain loop's time with the same kernels", ROBERTA, partial(ratio, name=OURS, base="plain_fast"), 1.03, at_least=False
    ),
    Target(
        "times the peak memory of HF Trainer + PEFT LoRA", SST2, partial(quotient, what="peak_memory", name=OURS, base="hf_lora"), 1.0,
        at_least=False,
    ),
    Target("times 1 rank's time on 2 ranks with half its threads each", SST2, partial(ratio, name="adakron_2ranks"), 1.1, at_least=False),
    Target(
        "times the plain loop's time from start to first step", SST2, partial(quotient, what="start_seconds", name=OURS, base="plain"), 2.0,
        at_least=False,
    ),
    Target("times as fast as HF Trainer + PEFT LoRA in scoring", SST2, partial(ratio, name="hf_lora", what="evaluation_seconds"), 1.0),
)  # fmt: skip


def table(judged: list[dict[str, Any]]) -> list[str]:
    """What `Target.judge` returned, as Markdown."""
    words = {True: "met", False: "not met", None: "not measured"}
    rows = [
        [
            one["case"], f"{'at least' if one['at_least'] else 'at most'} {one['limit']:g} {one['target']}",
            "-" if one["measured"] is None else f"{one['measured']:.2f}", words[one["met"]],
        ]
        for one in judged
    ]  # fmt: skip
    return markdown_table(["case", "target", "measured", ""], rows)
