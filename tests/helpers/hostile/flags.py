"""Command lines of launch/train.py with one to three bad flags."""

import os
from pathlib import Path

import numpy as np

from launch.arguments import train_parser
from tests.helpers.fuzzing import pick
from tests.helpers.hostile.values import NUMBERS, WORDS, word

UNKNOWN = ("--learning_rat", "--lr", "--hub_token", "--fp32", "--output-dirs", "--\x1b[31m", "--" + "x" * 50_000, "-q", "--do_trian")

# Of each of these, the program is told nothing but the name.
_ABSENT = ("config", "deepspeed", "local_rank", "help")


def hostile(rng: np.random.Generator, folder: Path) -> tuple[list[str], list[str]]:
    """Flags to append to a good command line, and the names of which a refusal must say one."""
    actions = [action for action in train_parser()._actions if action.dest not in _ABSENT]
    arguments: list[str] = []
    named: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        how = rng.random()
        action = pick(rng, actions)
        flag = pick(rng, action.option_strings)
        named += [action.dest, flag, flag.lstrip("-")]
        if how < 0.08:
            unknown = pick(rng, UNKNOWN)
            arguments += [unknown, word(rng)]
            named += [unknown.replace("\x1b", "\\x1b")[:400], "unknown flag", "unexpected argument"]
        elif how < 0.14:
            arguments += [pick(rng, WORDS)]
            named += ["unexpected argument", "unknown flag", "expected"]
        elif how < 0.2:
            arguments += [flag]
        elif how < 0.26:
            arguments += [flag, "1", flag, word(rng)]
        elif how < 0.5 and action.choices:
            arguments += [flag, pick(rng, [str(choice) for choice in action.choices])]
        elif how < 0.6 and action.dest.endswith(("_dir", "_file", "_path", "tokenizer_name")):
            arguments += [flag, special_path(rng, folder)]
        else:
            value = _of_kind(rng, action.type) if rng.random() < 0.75 else word(rng)
            arguments += [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]
    if "\ud800" in "".join(arguments):
        named += ["holds bytes that are no UTF-8"]
    # Some contradict others that the base gives: those are named as well.
    return arguments, [
        *named,
        "task_name",
        "model",
        "expert",
        "bottleneck_dim",
        "data_dir",
        "output_dir",
        "split",
        "nothing to train",
        "unknown flag",
    ]


def _of_kind(rng: np.random.Generator, kind: object) -> str:
    """A value that a flag of that type parses."""
    if kind in (int, float):
        numbers = [number for number in NUMBERS if kind is float or isinstance(number, int)]
        return str(pick(rng, [*numbers, *(("nan", "inf", "-inf", "1e-400", "1e999") if kind is float else ("007", " 3 ", "1_000"))]))
    return word(rng)


def special_path(rng: np.random.Generator, folder: Path) -> str:
    """A path of something that is no ordinary file: a pipe, a loop of links, a folder that nobody may read, a device."""
    kind = pick(rng, ("pipe", "loop", "dangling", "empty folder", "below a file", "/dev/zero", "/dev/full", "/proc/self/mem", "long"))
    path = folder / kind.strip("/").replace("/", "-")
    if kind.startswith("/"):
        return kind
    if path.exists() or path.is_symlink():
        return str(path)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(folder / "nowhere")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "below a file":
        path.write_text("x")
        return str(path / "below" / "it")
    else:
        return str(folder / ("n" * 300) / ("m" * 5000))
    return str(path)
