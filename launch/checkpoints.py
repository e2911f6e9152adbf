"""The checkpoints of a run: what is there, whether it is whole, and fewer of them.

    python launch/checkpoints.py ls RUN [--json]
    python launch/checkpoints.py verify RUN [--json]
    python launch/checkpoints.py prune RUN --keep N [--dry_run]

Marks: latest, as the run's file of that name says; best, by its evaluations; resume, from which the run would go on.
All of them look at checkpoints alone: the adapter in RUN itself, which a finished run leaves, has no manifest to compare with.
Exit code 0: done, and for verify: all are whole. 1: verify found a damaged checkpoint, or none at all. 2: an error, printed.
ls and verify write nothing and may run beside the training; prune needs the run to be over. More: docs/checkpoints.md.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import argparse
import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from adakron.checkpoint import newest_resumable
from adakron.errors import CheckpointError, ConfigError
from adakron.launcher import World
from adakron.log import get_logger
from adakron.redaction import printable, shortened
from adakron.run_folder import RUN_FILE, STATE_FILE
from adakron.run_lock import RunLock
from adakron.store import Checkpoint, CheckpointStore
from adakron.untrusted import read_text
from launch.messages import did_you_mean
from launch.program import execute, refuse_launcher

logger = get_logger(__name__)

EXIT_DAMAGED = 1
"""Exit code of verify where not every checkpoint is whole, as cmp and diff have it."""

STATE_BYTES = 2**30
"""Longest trainer_state.json: its log history grows with the run, some 200 bytes for each line."""


class _Parser(argparse.ArgumentParser):
    # Not launch.arguments.Parser: that takes its flags from configuration classes, and has no commands.
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists every flag")


@dataclass(frozen=True)
class _Line:
    """One checkpoint as it is shown. size: of all its files, in bytes. metric: what decides the best, and its value at this step.

    unresumable: why a run cannot go on from it although it is whole; looked for in those that are newer than the one marked resume.
    """

    checkpoint: Checkpoint
    size: int
    metric: tuple[str, float] | None
    marks: list[str]
    problems: tuple[str, ...]
    unresumable: str | None

    def to_dict(self) -> dict[str, Any]:
        name, value = self.metric or (None, None)
        if value is not None and not math.isfinite(value):
            value = None  # JSON has no such numbers
        return {
            "step": self.checkpoint.step, "name": self.checkpoint.name, "bytes": self.size, "metric": name, "value": value,
            "marks": self.marks, "good": not self.problems, "problems": list(self.problems),
            "unresumable": self.unresumable,
        }  # fmt: skip


def main(arguments: Sequence[str], world: World) -> int:
    """Run one of the three commands; its exit code."""
    refuse_launcher(world)
    options = _parse(arguments)
    folder = Path(options.run_folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; name the output folder of a run")
    store = CheckpointStore(folder)
    if re.fullmatch(r"checkpoint-\d+", folder.absolute().name) and not (folder / RUN_FILE).exists() and not store.checkpoints():
        raise ConfigError(f"{folder} is a checkpoint; name the run that it belongs to: {folder.absolute().parent}")
    if options.command == "prune":
        _prune(folder, store, options.keep, options.dry_run)
        return 0
    lines = _examine(folder, store)
    damaged = not lines or any(line.problems for line in lines)
    if options.json:
        print(json.dumps({"run": str(folder), "checkpoints": [line.to_dict() for line in lines]}, indent=2))
    elif not lines:
        print(f"{folder} holds no checkpoint")
    else:
        print(_table(lines) if options.command == "ls" else _report(lines))
    return EXIT_DAMAGED if damaged and options.command == "verify" else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its flags. Raises ConfigError."""
    parser = _Parser(prog="checkpoints.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser(
        "ls",
        help="List the checkpoints, oldest first, with their marks and what is wrong with them.",
        allow_abbrev=False,
    )
    verify = commands.add_parser("verify", help="Compare every byte with the manifests; exit code 1 on damage.", allow_abbrev=False)
    prune = commands.add_parser("prune", help="Delete all but the newest good ones, the best, the one to resume from.", allow_abbrev=False)
    for command in (ls, verify, prune):
        command.add_argument("run_folder", metavar="RUN", help="Output folder of a run.")
    for command in (ls, verify):
        command.add_argument("--json", action="store_true", help="Print JSON.")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="Keep the newest N good ones.")
    prune.add_argument("--dry_run", action="store_true", help="Only say what would be deleted.")
    options, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flags = commands.choices[options.command]._option_string_actions.keys() - {"-h", "--help"}
        hint = did_you_mean(unknown[0].split("=")[0], flags) if unknown[0].startswith("-") else "; --help lists every flag"
        raise ConfigError(f"{options.command} takes no {unknown[0]}{hint}")
    return options


def _examine(folder: Path, store: CheckpointStore) -> list[_Line]:
    examined = list(store.examined())[::-1]
    latest = store.latest
    good = [one.checkpoint for one in examined if not one.problems]
    resumable = newest_resumable(folder, examined[::-1])
    try:
        best = _best_step(folder, good[-1] if good else None)
    except CheckpointError as error:
        logger.warning("%s", error)
        best = None
    lines = []
    for one in examined:
        checkpoint = one.checkpoint
        marks = [
            mark
            for mark, there in (
                ("latest", latest == checkpoint),
                ("best", best == checkpoint.step),
                ("resume", resumable.checkpoint == checkpoint.path),
            )
            if there
        ]
        metric = None if one.problems else _metric(checkpoint)
        unresumable = None if one.problems else resumable.rejected.get(checkpoint.path)
        lines.append(_Line(checkpoint, _size(checkpoint.path), metric, marks, one.problems, unresumable))
    return lines


def _prune(folder: Path, store: CheckpointStore, keep: int, dry_run: bool) -> None:
    # In a folder without checkpoints there is nothing to lock.
    with contextlib.nullcontext() if dry_run or not store.checkpoints() else RunLock(folder, elsewhere=None):
        examined = list(store.examined())
        best = _best_step(folder, next((one.checkpoint for one in examined if not one.problems), None))
        saved = newest_resumable(folder, examined).saved
        resumes = saved.snapshot.step if saved else None
        gone = store.prunable(keep, best, resumes) if dry_run else store.prune(keep, best, resumes)
    verb = "would delete" if dry_run else "deleted"
    print("\n".join(f"{verb} {checkpoint.name}" for checkpoint in gone) or "nothing to delete")


def _best_step(folder: Path, newest: Checkpoint | None) -> int | None:
    """The step of the best evaluation: as the finished run says, else as its newest good checkpoint does."""
    for place in (folder, *([newest.path] if newest else [])):
        state = _read_state(place)
        if state:
            best = state.get("best_step")
            return best if isinstance(best, int) else None
    return None


def _read_state(folder: Path) -> dict[str, Any]:
    file = folder / STATE_FILE
    try:
        # Not `read_json`: a metric may be no number (a correlation with a constant).
        state = json.loads(read_text(file, STATE_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): it says which checkpoint is the best; restore or delete it") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds no object: it says which checkpoint is the best; restore or delete it")
    return state


def _metric(checkpoint: Checkpoint) -> tuple[str, float] | None:
    try:
        state = _read_state(checkpoint.path)
        name = f"eval_{state.get('metric_for_best_model')}"
        values = [
            entry[name]
            for entry in state.get("log_history", [])
            if isinstance(entry, dict) and entry.get("step") == checkpoint.step and name in entry
        ]
        return (name, float(values[-1])) if values else None
    except CheckpointError as error:
        logger.warning("%s", error)
    except (TypeError, ValueError, OverflowError):
        logger.warning("%s says its metrics in a way that this release does not read", checkpoint.path / STATE_FILE)
    return None


def _size(folder: Path) -> int:
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # the run is deleting it
                size += os.lstat(os.path.join(place, name)).st_size
    return size


def _state(line: _Line) -> str:
    if not line.problems:
        return "good" + (f", but {_why(line)}" if line.unresumable else "")
    more = len(line.problems) - 1
    return f"bad: {line.problems[0]}" + (f" (and {more} more)" if more else "")


def _why(line: _Line) -> str:
    """Why nothing goes on from it, without the folder's name in front."""
    return shortened(printable(str(line.unresumable).removeprefix(f"{line.checkpoint.path} ")))


def _table(lines: Sequence[_Line]) -> str:
    metric = shortened(printable(next((line.metric[0] for line in lines if line.metric), "metric")), 60)
    rows = [("step", "KiB", metric, "marks", "state")]
    for line in lines:
        value = f"{line.metric[1]:.4f}" if line.metric else "-"
        rows.append((str(line.checkpoint.step), f"{line.size / 1024:,.0f}", value, ", ".join(line.marks) or "-", _state(line)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{step:>{widths[0]}}  {size:>{widths[1]}}  {value:>{widths[2]}}  {marks:<{widths[3]}}  {state}"
        for step, size, value, marks, state in rows
    )


def _report(lines: Sequence[_Line]) -> str:
    texts = []
    for line in lines:
        texts.append(f"{line.checkpoint.name}: " + ("good" if not line.problems else "bad"))
        texts += [f"  - {problem}" for problem in line.problems]
        texts += [f"  - {_why(line)}"] if line.unresumable else []
    return "\n".join(texts)


if __name__ == "__main__":
    execute(main)
