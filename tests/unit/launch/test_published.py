"""The published scripts' flags for mixtures, in the README's and in AdaMix's meaning."""

import re
import shlex
from pathlib import Path

import pytest

from adakron.errors import ConfigError
from adakron.peft.method_settings import available
from launch import generate
from launch.arguments import parse_train, train_parser
from launch.published import ELSEWHERE


@pytest.mark.parametrize(
    ("arguments", "experts", "projections"),
    [
        ("--apply_expert_soup --num_experts 2 --inference_level 3 --sharing_down 0 --sharing_up 1", 2, ("down_a", "down_b")),
        ("--num_experts 2 --sharing_up false --sharing_down 4", 2, ("down_a",)),
        ("--num_experts 2 --sharing_down 2 --kron_factor 2", 2, ("down_a", "down_b")),
        ("--method adamix --sharing_up 1", 4, ("down",)),
        ("--method adamix --sharing_down 0", 4, ("down", "up")),
        ("--method adamix --sharing_down 1", 4, ("up",)),
        ("--method adamix --sharing_up 0 --sharing_down 0", 4, ("down", "up")),
        ("--method adamix --sharing_up 0 --sharing_down 1", 4, ("up",)),
    ],
)
def test_sharing_flags_place_experts(arguments, experts, projections):
    adapter = parse_train(shlex.split(arguments)).adapter
    assert (adapter.num_experts, adapter.expert_projections) == (experts, projections)


@pytest.mark.parametrize(("flag", "weight"), [("0", 0.0), ("1", 1.0)])
def test_the_consistency_switch_is_a_weight(flag, weight):
    assert parse_train(["--use_consistency_loss", flag]).training.consistency_weight == weight


@pytest.mark.parametrize("flag", ELSEWHERE)
def test_other_published_flags_are_told_where_to_go(flag):
    with pytest.raises(ConfigError, match=rf"{flag} is a flag of the published scripts; .*docs/migration.md"):
        parse_train([flag, "1"])


def test_what_is_recommended_exists():
    known = {option for action in train_parser()._actions for option in action.option_strings}
    for advice in ELSEWHERE.values():
        assert {word for word in advice.split() if word.startswith("--")} <= known, advice
        for method in re.findall(r"--method (\w+)", advice):
            assert parse_train(["--method", method]).adapter.preset or method in available(), advice
    assert not {*ELSEWHERE} & known


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--sharing_down 4", "--sharing_down places experts, but there is one"),
        ("--apply_expert_soup false", "asks for no adapters"),
        ("--sharing_up true", "--sharing_up places experts, but there is one"),
        ("--num_experts 2 --sharing_down 1", r"--sharing_down is 1; .* kron_factor, which is 4"),
        ("--num_experts 2 --sharing_up 1 --experts_in up", "both place the experts"),
        ("--method madakron --sharing_up 0", "--method is madakron; drop them"),
        ("--method adamix --sharing_down 4", "must be 1"),
        ("--method adamix --sharing_down 1 --sharing_up 1", "leave no projection with experts"),
        ("--use_consistency_loss 1 --consistency_weight 2", "contradicts"),
        ("--method lora --apply_expert_soup", "--apply_expert_soup means a method with adapters"),
    ],
)
def test_contradictions_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        parse_train(shlex.split(arguments))


def test_every_flag_of_the_migration_tables_right_column_exists():
    parsers = {"launch/train.py": train_parser(), "launch/generate.py": generate.parser()}
    flags = {name: {option for action in parser._actions for option in action.option_strings} for name, parser in parsers.items()}
    text = (Path(__file__).resolve().parents[3] / "docs" / "migration.md").read_text(encoding="utf-8")
    tables = text.split("## Checkpoints")[0]
    rows = [line.split("|")[1:3] for line in tables.splitlines() if line.startswith("| `--")]
    assert len(rows) > 40
    for published, ours in rows:
        same = published if ours.strip().startswith("the same") else ""
        wanted = set(re.findall(r"--[a-z_0-9]+", same + ours.split("there")[0]))
        known = flags["launch/generate.py" if "launch/generate.py" in ours else "launch/train.py"]
        assert wanted <= known, (published, wanted - known)
