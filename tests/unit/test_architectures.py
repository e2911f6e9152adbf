"""Every method in every architecture: the checks behind docs/support.md."""

import pytest

from adakron.placement import PLACEMENT, find_sites
from tests.helpers.adapted_models import expected_sites, plain
from tests.helpers.architectures import PLACES
from tests.helpers.support_checks import CHECKS, applicable
from tests.helpers.support_matrix import CELLS, FILE, METHODS, render

CASES = [
    pytest.param(check, model_type, settings, id=f"{model_type}-{method}-{check}")
    for model_type in PLACEMENT
    for method, settings in METHODS
    for check in applicable(model_type, settings)
]


@pytest.mark.parametrize(("check", "model_type", "settings"), CASES)
def test_check(check: str, model_type: str, settings: dict[str, object]) -> None:
    CHECKS[check](model_type, settings)


@pytest.mark.parametrize("position", ["ffn", "attention", "both"])
@pytest.mark.parametrize("model_type", PLACEMENT)
def test_sites_of_every_position(model_type: str, position: str) -> None:
    assert find_sites(plain(model_type), position=position) == expected_sites(model_type, position)  # type: ignore[arg-type]


def test_every_cell_is_checked() -> None:
    assert {*PLACES} == {*PLACEMENT} and len(CELLS) == len(PLACEMENT) * len(METHODS)
    assert {parameter.values[0] for parameter in CASES} == {*CHECKS}


def test_the_page_says_what_these_tests_check() -> None:
    # All tests above passing is what an empty tuple stands for.
    expected = render(dict.fromkeys(CELLS, ()))
    assert FILE.read_text(encoding="utf-8") == expected, "docs/support.md is old: python -m tests.helpers.support_matrix"


def test_what_did_not_run_or_failed_does_not_say_yes() -> None:
    def row(failed: tuple[str, ...] | None) -> list[str]:
        cells = dict.fromkeys(CELLS, ()) | ({} if failed is None else {("gpt2", "adakron"): failed})
        if failed is None:
            del cells["gpt2", "adakron"]
        line = next(line for line in render(cells).splitlines() if line.startswith("| `gpt2` |"))
        return line.strip("| ").split(" | ")

    assert {*row(())[1:]} == {"yes"}
    assert (row(None)[1], row(None)[2], row(None)[-2:]) == ("not run", "yes", ["not run", "not run"])
    assert (row(("start", "generation"))[1], row(("start", "generation"))[-2:]) == ("**no**: start, generation", ["**no**", "yes"])
