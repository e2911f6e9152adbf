"""`launch/train.py --replay`: which flags go with it."""

import re

import pytest

from adakron.errors import CheckpointError, ConfigError
from adakron.launcher import World
from launch.arguments import train_parser
from launch.replaying import run_replay


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--unknown_flag",), r"^unknown flag --unknown_flag; --help lists every flag$"),
        (("--trust-remote-cod",), r"^unknown flag --trust-remote-cod; did you mean --trust_remote_code\?$"),
        (("--learning_rate", "1"), r"^--learning_rate does not go with --replay: .*only --model_name_or_path and --trust_remote_code"),
        (("--config=a.yaml", "--seed", "1"), r"--config does not go with --replay(.|\n)*--seed does not go with --replay"),
        (("stray",), r"unexpected argument 'stray'"),
    ],
)
def test_other_flags_are_refused_before_the_file_is_read(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_replay(["--replay", "none.safetensors", *arguments], World())


def test_launchers_flag_and_the_place_of_the_backbone_are_taken() -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        run_replay(["--replay=none.safetensors", "--local_rank=0", "--model_name_or_path", "x", "--trust_remote_code"], World())


def test_help_says_which_flags_go_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    action = train_parser()._option_string_actions["--replay"]
    with pytest.raises(SystemExit):
        run_replay(["--replay", "none.safetensors", "--help"], World())
    shown = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert shown == {"--help", "--replay", "--model_name_or_path", "--trust_remote_code"}
    assert all(flag in str(action.help) for flag in ("--model_name_or_path", "--trust_remote_code"))
