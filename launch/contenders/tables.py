"""What was measured, as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.contenders import CONTENDERS
from launch.contenders.phases import PHASES

OURS = "adakron"


def ratio(result: Mapping[str, Any], name: str, base: str = OURS, what: str = "seconds") -> float | None:
    """How many times as long one contender takes as another: the median over the turns, in each of which both met the same machine.

    None where one of them was not measured. what: "seconds" of training, or "evaluation_seconds".
    """
    pairs = zip(*(result["contenders"].get(one, {}).get(what, []) for one in (name, base)), strict=False)
    ratios = [mine / other for mine, other in pairs]
    return statistics.median(ratios) if ratios else None


def of_the_limit(result: Mapping[str, Any], name: str = OURS) -> float | None:
    """Useful FLOP per second, relative to what bare matrix products reach; None where it was not measured."""
    seconds = result["contenders"].get(name, {}).get("seconds")
    return result["flop_per_round"] / statistics.median(seconds) / result["products_flop_per_second"] if seconds else None


def samples_per_second(result: Mapping[str, Any]) -> dict[str, float]:
    """Of training, by contender, the fastest first."""
    examples = result["workload"]["examples"]
    return {name: examples / statistics.median(seconds) for name, seconds in _by_median(result, "seconds")}


def document(result: Mapping[str, Any]) -> list[str]:
    """All tables of one comparison."""
    work = result["workload"]
    size = f"a random {work['model_size']}, " if work["model_size"] else ""
    lines = [
        f"{work['task_name']}, {size}{work['examples']} examples, batch {work['batch']}, {work['precision']},"
        f" {result['machine']['threads']} threads, {work['rounds']} rounds in turn; matrix products reach"
        f" {result['products_flop_per_second'] / 1e9:,.0f} GFLOP/s",
        "", *speeds(result), "", *phases(result),
    ]  # fmt: skip
    overhead = ratio(result, OURS, "plain_fast")
    if overhead is not None:
        lines += ["", f"engine overhead over the plain loop with the same kernels: {100 * (overhead - 1):.1f} %"]
    if work["evaluation_examples"]:
        lines += ["", f"Scoring {work['evaluation_examples']} examples:", "", *evaluation(result)]
    return lines


def speeds(result: Mapping[str, Any]) -> list[str]:
    """Training, the fastest first."""
    examples, useful = result["workload"]["examples"], result["useful_tokens_per_round"]
    rows = []
    for name, seconds in _by_median(result, "seconds"):
        one, median = result["contenders"][name], statistics.median(seconds)
        rows.append([
            CONTENDERS[name].name, number(examples / median), _spread(seconds), f"{useful / median:,.0f}",
            f"{100 * (of_the_limit(result, name) or 0):.0f} %", f"{one['peak_memory'] / 2**20:,.0f} MiB", _ratio(ratio(result, name)),
        ])  # fmt: skip
    return markdown_table(["", "samples/s", "spread", "useful tokens/s", "of the limit", "peak memory", "this engine is faster by"], rows)


def phases(result: Mapping[str, Any]) -> list[str]:
    """Medians of a step's phases, in ms, and the way to the first step, in s."""
    rows = []
    for name, _ in _by_median(result, "seconds"):
        one = result["contenders"][name]
        found = [f"{one['phases_ms'][phase]:,.1f}" if phase in one["phases_ms"] else "-" for phase in ("step", *PHASES, "rest")]
        rows.append([CONTENDERS[name].name, *found, f"{one['start_seconds']:.1f}"])
    heads = ["ms of a step", "whole", "data", "forward", "backward", "reduce, optimizer", "log", "rest", "start to first step, s"]
    return markdown_table(heads, rows)


def evaluation(result: Mapping[str, Any]) -> list[str]:
    """Scoring, the fastest first."""
    examples = result["workload"]["evaluation_examples"]
    rows = [
        [
            CONTENDERS[name].name, number(examples / statistics.median(seconds)), _spread(seconds),
            _ratio(ratio(result, name, what="evaluation_seconds")),
        ]
        for name, seconds in _by_median(result, "evaluation_seconds")
    ]  # fmt: skip
    return markdown_table(["", "samples/s", "spread", "this engine is faster by"], rows)


def _by_median(result: Mapping[str, Any], what: str) -> list[tuple[str, list[float]]]:
    measured = [(name, one[what]) for name, one in result["contenders"].items() if one[what]]
    return sorted(measured, key=lambda item: statistics.median(item[1]))


def _spread(seconds: Sequence[float]) -> str:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    return f"{100 * (quartiles[2] - quartiles[0]) / median:.0f} %"


def number(value: float) -> str:
    """Rounded to whole numbers, or to three digits below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(found: float | None) -> str:
    return f"{found:.2f}" if found is not None else ""


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, in lines."""
    head, *body = (f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (heads, *rows))
    return [head, "|" + "---|" * len(heads), *body]
