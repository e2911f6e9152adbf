"""docs/support.md: which method works in which architecture. `python -m tests.helpers.support_matrix` writes it again.

A cell says yes where every check of `tests.helpers.support_checks` that applies to it has run and passed.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adakron.placement import PLACEMENT
from tests.helpers.architectures import FLAT_FFN, PLACES, WITHOUT_CHECKPOINTING
from tests.helpers.support_checks import CHECKS, applicable, is_refused

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("adakron", {}),
    ("adakron, behind attention", {"position": "attention"}),
    ("madakron_partial", {"method": "madakron_partial"}),
    ("madakron", {"method": "madakron"}),
    ("adamix", {"method": "adamix"}),
    ("pfeiffer", {"method": "pfeiffer"}),
    ("houlsby", {"method": "houlsby"}),
    ("bitfit", {"method": "bitfit"}),
    ("full", {"method": "full"}),
    ("head", {"method": "head"}),
)
"""Name of a column, and the arguments of AdapterConfig that it stands for."""

CELLS = tuple((model_type, method) for model_type in PLACEMENT for method, _ in METHODS)
FILE = Path(__file__).resolve().parents[2] / "docs" / "support.md"

_INTRODUCTION = """\
# Architectures and methods

Written by `python -m tests.helpers.support_matrix`, which runs every check below for every cell; do not edit.
`tests/unit/test_architectures.py` runs the same checks and compares this file.

Every model is a random one with two layers (of each stack), built by transformers from a configuration: the structure is that of
the published models, the weights are not.
"""

_LEGEND = """\
"yes" means that all of these hold, as far as they apply:

| check | what holds |
|---|---|
"""


def run_cell(model_type: str, method: str) -> tuple[str, ...]:
    """The checks of one cell that fail."""
    settings = dict(METHODS)[method]
    failed = []
    for name in applicable(model_type, settings):
        try:
            CHECKS[name](model_type, settings)
        except Exception as error:
            print(f"{model_type}, {method}, {name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(name)
    return tuple(failed)


def render(failed: Mapping[tuple[str, str], tuple[str, ...]]) -> str:
    """The page. failed: the failed checks of every cell that has run; a cell that has not says so."""
    columns = ["model type", *(method for method, _ in METHODS), "generates", "activations again"]
    rows = [
        [
            f"`{model_type}`",
            *(_cell(model_type, method, failed.get((model_type, method))) for method, _ in METHODS),
            _property(model_type, "generation", failed),
            "no" if model_type in WITHOUT_CHECKPOINTING else _property(model_type, "checkpointing", failed),
        ]
        for model_type in PLACEMENT
    ]
    places = [[f"`{model_type}`", *_places(model_type)] for model_type in PLACEMENT]
    checks = "\n".join(f"| {name} | {_summary(name)} |" for name in CHECKS)
    flat = " and ".join(f"`{name}`" for name in FLAT_FFN)
    notes = [
        "*generates*: `generate()` of the language model, in the cells of methods with adapters. *activations again*: whether the code in",
        'transformers can compute activations again in the backward pass; where it says "no", asking for it is an error.',
        "",
        "*no biases*: the architecture has none outside its head, so `bitfit` is refused.",
        "",
        f"{flat} flattens the tokens of all sentences before the feed-forward block: an adapter there cannot tell sentences apart, so",
        "`--inference_level 1` (one random expert per sentence) has no meaning for it.",
    ]
    return "\n".join(
        [_INTRODUCTION, _table(columns, rows), "", *notes, "", _LEGEND + checks, "", "## Where adapters stand", "",
         "N is a layer number; the name of the backbone comes first. `--position ffn` is the default.", "",
         _table(["model type", "ffn", "attention"], places), ""]
    )  # fmt: skip


def _cell(model_type: str, method: str, failed: tuple[str, ...] | None) -> str:
    if failed is None:
        return "not run"
    if failed:
        return f"**no**: {', '.join(failed)}"
    return "no biases" if is_refused(model_type, dict(METHODS)[method]) else "yes"


def _property(model_type: str, check: str, failed: Mapping[tuple[str, str], tuple[str, ...]]) -> str:
    """What one check says over all methods that it applies to."""
    methods = [method for method, settings in METHODS if check in applicable(model_type, settings)]
    outcomes = [failed.get((model_type, method)) for method in methods]
    if not methods:
        return "-"
    if any(outcome is None for outcome in outcomes):
        return "not run"
    return "**no**" if any(check in (outcome or ()) for outcome in outcomes) else "yes"


def _places(model_type: str) -> tuple[str, str]:
    stacks = PLACES[model_type]
    ffn = [f"`{stack}.{place}`" for stack, _, place in stacks]
    return ", ".join(ffn), ", ".join(f"`{stack}.{place}`" for stack, place, _ in stacks)


def _summary(check: str) -> str:
    return re.sub(r"\s+", " ", CHECKS[check].__doc__ or "").strip().rstrip(".")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def main() -> int:
    """Run every cell and write the page; the number of cells that fail."""
    failed = {cell: run_cell(*cell) for cell in CELLS}
    FILE.write_text(render(failed), encoding="utf-8")
    return sum(1 for names in failed.values() if names)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
