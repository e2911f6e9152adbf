"""Kills writers of checkpoints, and looks after each what is left. Imports no torch: a fork takes a millisecond.

`python -m tests.helpers.checkpoint_killer calls FOLDER` kills at every system call of every kind of work;
`... moments FOLDER KILLS` kills at random moments. Both print {"kills", "seconds", "leftovers", "failures"} as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from adakron.manifest import verify
from adakron.run_lock import RunLock
from adakron.store import CheckpointStore
from tests.helpers.system_calls import can_trace, killed_at

KEEP = 2
Version = tuple[int, int]
"""A step, and how often that step was written before."""


def content(version: Version) -> dict[str, bytes]:
    """The files of a checkpoint: a large one, one in a folder, an empty one."""
    drawn = random.Random(repr(version))
    return {"adapter_model.safetensors": drawn.randbytes(60_000), "tokenizer/vocab.txt": drawn.randbytes(500), "empty": b""}


def write(store: CheckpointStore, version: Version) -> None:
    """Write that version of a checkpoint, its files in several writes."""

    def fill(folder: Path) -> None:
        for name, data in content(version).items():
            (folder / name).parent.mkdir(exist_ok=True)
            with (folder / name).open("wb", buffering=0) as file:
                for start in range(0, len(data), 20_000):
                    file.write(data[start : start + 20_000])

    store.write(version[0], fill)


def holds(folder: Path, version: Version) -> bool:
    """Whether a checkpoint folder holds exactly that version."""
    return all((folder / name).is_file() and (folder / name).read_bytes() == data for name, data in content(version).items())


class Inspection:
    """What is wrong after a kill, collected over all of them."""

    def __init__(self) -> None:
        self.kills = 0
        self.failures: list[str] = []
        self.leftovers: Counter[str] = Counter()

    def check(self, folder: Path, label: str, allowed: list[Version], kept: Mapping[int, list[Version]]) -> None:
        """After one kill: the newest is one of allowed, kept steps hold one of their versions, no bad ones, and writing goes on."""
        self.kills += 1
        store = CheckpointStore(folder)
        for entry in folder.iterdir():
            if entry.name.startswith(".") and entry.name != ".lock":
                self.leftovers[entry.name.rsplit(".", 1)[1]] += 1
        there = {one.step: one.path for one in store.checkpoints()}
        found = store.newest_good()
        newest = found.checkpoint
        if newest is None or not any(newest.step == version[0] and holds(newest.path, version) for version in allowed):
            self.failures.append(f"{label}: newest is {newest}, not one of {allowed}; {found.rejected}")
        for step, path in there.items():
            self.failures += [f"{label}: checkpoint-{step}: {problem}" for problem in verify(path)]
        for step, versions in kept.items():
            if step not in there or not any(holds(there[step], version) for version in versions):
                self.failures.append(f"{label}: checkpoint-{step} is lost")
        if store.latest is None:
            self.failures.append(f"{label}: latest names nothing that is there")
        following = (max(there, default=0) + 1, 0)
        with RunLock(folder):
            write(store, following)
        newest = store.newest_good().checkpoint
        if newest is None or not holds(newest.path, following) or store.latest != newest:
            self.failures.append(f"{label}: the next write left {newest}, latest {store.latest}")
        hidden = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(".") and entry.name != ".lock")
        if hidden:
            self.failures.append(f"{label}: the next write left {hidden}")


def at_every_call(folder: Path) -> Inspection:
    """A write, a write over one of its step, a prune, and a write beside what killed ones left, killed at each of their system calls."""
    template = folder / "template"
    template.mkdir(parents=True)
    store = CheckpointStore(template)
    for step in (1, 2, 3, 4):
        write(store, (step, 0))
    torn = folder / "torn"  # killed between the renames of a replacement, during a deletion, and within `latest`
    shutil.copytree(template, torn)
    (torn / "checkpoint-4").rename(torn / ".checkpoint-4.replaced")
    shutil.copytree(template / "checkpoint-4", torn / ".checkpoint-4.staging")
    (torn / ".checkpoint-1.deleted").mkdir()
    (torn / ".checkpoint-1.deleted" / "empty").touch()
    (torn / ".latest.123.partial").touch()

    def new(store: CheckpointStore) -> None:
        write(store, (5, 0))

    def again(store: CheckpointStore) -> None:
        write(store, (4, 1))

    def prune(store: CheckpointStore) -> None:
        store.prune(1, 2)

    four, others = (4, 0), {step: [(step, 0)] for step in (1, 2, 3)}
    cases: list[tuple[str, Path, Callable[[CheckpointStore], None], list[Version], dict[int, list[Version]]]] = [
        ("new", template, new, [four, (5, 0)], others | {4: [four]}),
        ("again", template, again, [four, (4, 1)], others | {4: [four, (4, 1)]}),
        ("prune", template, prune, [four], {2: [(2, 0)], 4: [four]}),
        ("new after a kill", torn, new, [four, (5, 0)], others | {4: [four]}),
    ]
    inspection = Inspection()
    for name, origin, work, allowed, kept in cases:
        for call in range(1, 100_000):
            run = folder / "run"
            shutil.copytree(origin, run)
            killed = killed_at(call, lambda work=work, run=run: work(CheckpointStore(run)))  # type: ignore[misc]
            inspection.check(run, f"{name}, call {call}", allowed, kept)
            shutil.rmtree(run)
            if not killed:
                break
    return inspection


def at_random_moments(folder: Path, kills: int) -> Inspection:
    """A writer that writes, rewrites and prunes for ever, killed again and again; each goes on where the one before died."""
    folder.mkdir(parents=True)
    store = CheckpointStore(folder)
    best = (1, 0)
    began = time.perf_counter()
    write(store, best)
    cycle = 3 * (time.perf_counter() - began)
    moments = random.Random(kills)
    inspection = Inspection()
    for _ in range(kills):
        first = store.checkpoints()[-1].step + 1
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _write_for_ever(folder, first, writer)
        os.close(writer)
        time.sleep(moments.uniform(0, 2 * cycle))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(reader, encoding="ascii") as pipe:
            said = [(word, (int(step), int(again))) for word, step, again in (line.split() for line in pipe)]
        done: dict[int, Version] = {version[0]: version for word, version in said if word == "done"}
        begun = [version for word, version in said if word == "begin"][-1:]
        completed = {best[0]: best, first - 1: (first - 1, 0), **done}
        kept = {step: [completed[step], *(version for version in begun if version[0] == step)] for step in sorted(completed)[-KEEP:]}
        newest = completed[max(completed)]
        inspection.check(folder, f"kill {inspection.kills + 1}", [newest, *begun], kept | {best[0]: [best]})
    return inspection


def _write_for_ever(folder: Path, first: int, pipe: int) -> NoReturn:
    store = CheckpointStore(folder)
    with RunLock(folder):
        step = first
        while True:
            for again in (0, 1):
                os.write(pipe, f"begin {step} {again}\n".encode())
                write(store, (step, again))
                os.write(pipe, f"done {step} {again}\n".encode())
            store.prune(KEEP, 1)
            step += 1


def main() -> None:
    """Run one of the two and print what was found."""
    began = time.perf_counter()
    if sys.argv[1] == "calls":
        if not can_trace():
            print(json.dumps(None))
            return
        inspection = at_every_call(Path(sys.argv[2]))
    else:
        inspection = at_random_moments(Path(sys.argv[2]), int(sys.argv[3]))
    seconds = time.perf_counter() - began
    print(json.dumps({"kills": inspection.kills, "seconds": seconds, "leftovers": inspection.leftovers, "failures": inspection.failures}))


if __name__ == "__main__":
    main()
