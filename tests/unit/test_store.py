"""The store without accidents, and what it finds after damage; kills are in test_store_kills.py."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adakron import store as store_module
from adakron.errors import ConfigError
from adakron.manifest import MANIFEST_FILE
from adakron.store import LATEST_FILE, Checkpoint, CheckpointStore


def write(store: CheckpointStore, *steps: int, text: str = "") -> None:
    for step in steps:
        store.write(step, lambda folder, step=step: (folder / "weights").write_text(text or f"weights of {step}") and None)  # type: ignore[misc]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    made = CheckpointStore(tmp_path)
    write(made, 5, 10, 100)
    return made


def test_checkpoints_are_written_named_and_found(store: CheckpointStore, tmp_path: Path) -> None:
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-5", "latest"]
    assert names(tmp_path / "checkpoint-5") == [MANIFEST_FILE, "weights"]
    assert store.checkpoints() == [Checkpoint(step, tmp_path / f"checkpoint-{step}") for step in (5, 10, 100)]
    assert (tmp_path / LATEST_FILE).read_text() == "checkpoint-100\n"
    found = store.newest_good()
    assert found.checkpoint == store.latest == store.checkpoints()[-1] and found.rejected == ()


def test_an_empty_or_missing_run_has_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        store = CheckpointStore(folder)
        assert store.checkpoints() == [] and store.newest_good().checkpoint is None and store.latest is None
        assert store.prunable(1, None) == []


def test_entries_with_other_names_are_not_checkpoints(store: CheckpointStore, tmp_path: Path) -> None:
    for name in ("checkpoint-007", "checkpoint-", "checkpoint-x", "checkpoint-1.5", "checkpoint-٣", "old-checkpoint-3", "checkpoint--1"):
        shutil.copytree(tmp_path / "checkpoint-5", tmp_path / name)
    (tmp_path / "checkpoint-200").write_text("a file")
    assert [one.step for one in store.checkpoints()] == [5, 10, 100]
    before = names(tmp_path)
    store.prune(3, None)
    write(store, 300)
    assert names(tmp_path) == sorted([*before, "checkpoint-300"])


def damage_weights(folder: Path) -> None:
    (folder / "weights").write_text("x" * 14)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda folder: os.truncate(folder / "weights", 3), "weights has 3 bytes, and was written with 14"),
    "flipped": (damage_weights, r"weights has other content than was written \(SHA-256 differs\)"),
    "missing": (lambda folder: (folder / "weights").unlink(), "weights is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST_FILE).unlink(), "written by an older version of this program, or half-written"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "written by an older version of this program, or half-written"),
    "manifest": (lambda folder: os.truncate(folder / MANIFEST_FILE, 20), "manifest.json is damaged: "),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_falls_back_to_the_one_before_and_says_why(kind: str, store: CheckpointStore, tmp_path: Path) -> None:
    damage, reason = DAMAGES[kind]
    damage(tmp_path / "checkpoint-100")
    found = store.newest_good()
    assert found.checkpoint is not None and found.checkpoint.step == 10
    (rejected,) = found.rejected
    assert rejected.checkpoint.step == 100
    text = "; ".join(rejected.problems)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(text)
    damage(tmp_path / "checkpoint-10")
    damage(tmp_path / "checkpoint-5")
    found = store.newest_good()
    assert found.checkpoint is None and [one.checkpoint.step for one in found.rejected] == [100, 10, 5]
    # ... and writing that step again mends it.
    write(store, 100)
    assert store.newest_good().checkpoint == store.checkpoints()[-1]


def test_any_truncation_falls_back(store: CheckpointStore, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "weights").write_bytes(random.Random(0).randbytes(5000))

    store.write(200, fill)
    for name in ("weights", MANIFEST_FILE):
        file = tmp_path / "checkpoint-200" / name
        size = file.stat().st_size - (name == MANIFEST_FILE)
        for kept in sorted(random.Random(1).sample(range(size), 60), reverse=True):
            os.truncate(file, kept)
            found = store.newest_good()
            assert found.checkpoint is not None and found.checkpoint.step == 100


def test_the_order_is_that_of_steps_whatever_the_clock_says(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    year = 365 * 86_400
    for step, when in ((5, 4e9), (10, 0.0), (100, time.time() - 50 * year)):
        for path in (tmp_path / f"checkpoint-{step}").rglob("*"):
            os.utime(path, (when, when))
        os.utime(tmp_path / f"checkpoint-{step}", (when, when))
    monkeypatch.setattr(time, "time", lambda: -1.0)
    assert [one.step for one in store.checkpoints()] == [5, 10, 100]
    write(store, 101)
    os.utime(tmp_path / "checkpoint-101", (0, 0))
    found = store.newest_good()
    assert found.checkpoint is not None and found.checkpoint.step == 101
    assert [one.step for one in store.prune(2, None)] == [5, 10]


def test_writing_a_step_again_replaces_it(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, 10, text="second")
    assert (tmp_path / "checkpoint-10" / "weights").read_text() == "second"
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-5", "latest"]
    # latest is what was written last; what to resume from is the newest.
    assert store.latest == store.checkpoints()[1] and store.newest_good().checkpoint == store.checkpoints()[2]


def test_while_a_step_is_replaced_the_old_one_is_found(store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = store_module.rename_folder

    def watched(source: Path, target: Path) -> None:
        real(source, target)
        newest = store.newest_good().checkpoint
        assert newest is not None
        seen.append((newest.name, newest.path.name, (newest.path / "weights").read_text()))

    monkeypatch.setattr(store_module, "rename_folder", watched)
    write(store, 100, text="second")
    assert seen == [
        ("checkpoint-100", ".checkpoint-100.replaced", "weights of 100"),
        ("checkpoint-100", "checkpoint-100", "second"),
    ]


def test_a_failing_replacement_puts_the_old_one_back(store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store_module.rename_folder

    def failing(source: Path, target: Path) -> None:
        if source.name.endswith("staging"):
            raise ZeroDivisionError
        real(source, target)

    monkeypatch.setattr(store_module, "rename_folder", failing)
    with pytest.raises(ZeroDivisionError):
        write(store, 100, text="second")
    assert (tmp_path / "checkpoint-100" / "weights").read_text() == "weights of 100"
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-5", "latest"]


def test_an_error_of_the_writer_passes_and_leaves_nothing(store: CheckpointStore, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(100, fill)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-5", "latest"]
    assert store.newest_good().rejected == ()


def test_pruning_keeps_the_newest_good_ones_and_the_best(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, 101, 102, 103)
    damage_weights(tmp_path / "checkpoint-102")
    assert [one.step for one in store.prunable(2, 5)] == [10, 100]
    assert len(store.checkpoints()) == 6
    # 102 is bad and does not count; it goes when it is older than those kept.
    assert [one.step for one in store.prune(2, 5)] == [10, 100]
    assert names(tmp_path) == ["checkpoint-101", "checkpoint-102", "checkpoint-103", "checkpoint-5", "latest"]
    assert [one.step for one in store.prune(1, None)] == [5, 101, 102]
    with pytest.raises(ConfigError, match="keep is 0: the last good checkpoint is never deleted"):
        store.prune(0, None)


def test_the_last_good_one_is_never_deleted(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (10, 100):
        damage_weights(tmp_path / f"checkpoint-{step}")
    assert store.prune(1, None) == []
    newest = store.newest_good().checkpoint
    assert newest is not None and newest.step == 5


def test_a_latest_that_names_nothing_does_no_harm(store: CheckpointStore, tmp_path: Path) -> None:
    for content in (b"checkpoint-7\n", b"", b"../../etc\n", b"\xff"):
        (tmp_path / LATEST_FILE).write_bytes(content)
        assert store.latest is None
    (tmp_path / LATEST_FILE).unlink()
    newest = store.newest_good().checkpoint
    assert store.latest is None and newest is not None and newest.step == 100


def test_a_checkpoint_that_was_moved_and_linked_is_read_and_its_content_never_deleted(store: CheckpointStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "checkpoint-5").rename(elsewhere)
    (tmp_path / "checkpoint-5").symlink_to(elsewhere)
    assert [one.problems for one in store.examined()] == [(), (), ()]
    assert [one.step for one in store.prune(2, None)] == [5]
    assert not (tmp_path / "checkpoint-5").is_symlink() and (elsewhere / "weights").exists()


def test_a_half_deleted_old_one_never_comes_back(store: CheckpointStore, tmp_path: Path) -> None:
    # Killed while it deleted what it had replaced; then the new one of that step is pruned.
    (tmp_path / ".checkpoint-5.replaced").mkdir()
    store.prune(1, None)
    assert names(tmp_path) == ["checkpoint-100", "latest"]


def test_a_checkpoint_that_disappears_while_it_is_read_is_not_damaged(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store_module.verify

    def deleted(folder: Path) -> list[str]:
        if folder.name == "checkpoint-100":
            shutil.rmtree(folder)
        return real(folder)

    monkeypatch.setattr(store_module, "verify", deleted)
    found = store.newest_good()
    assert found.checkpoint is not None and found.checkpoint.step == 10 and found.rejected == ()


def test_what_a_power_cut_may_leave_is_in_order(store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Content before its manifest, the manifest before the name, the name before `latest`: each on the disk before the next.
    events: list[str] = []
    real = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace}

    def synced(descriptor: int) -> None:
        events.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real["fsync"](descriptor)

    def renamed(kind: str, source: str | Path, target: str | Path) -> None:
        events.append(f"name {os.path.relpath(target, tmp_path)}")
        real[kind](source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda source, target: renamed("rename", source, target))
    monkeypatch.setattr(os, "replace", lambda source, target: renamed("replace", source, target))
    write(store, 100)
    new = ".checkpoint-100.staging"
    assert [event.replace(f".{os.getpid()}.partial", "") for event in events] == [
        f"sync {new}/weights", f"sync {new}", f"sync {new}/.manifest.json", f"name {new}/manifest.json", f"sync {new}",
        "name .checkpoint-100.replaced", "sync .", "name checkpoint-100", "sync .", "sync .latest", "name latest", "sync .",
    ]  # fmt: skip
