"""Full disks, folders that cannot be written, failing devices: one error with a remedy, and every checkpoint as it was."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.numpy
from numpy import ones
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from adakron import atomic
from adakron.errors import CheckpointError
from adakron.store import CheckpointStore

RULE = r"a checkpoint is saved whole or not at all, and the others are as they were"
LARGE = 3_000_000


def small(folder: Path) -> None:
    (folder / "weights").write_text("small")


def plain(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x" * LARGE)


def of_safetensors(folder: Path) -> None:
    safetensors.numpy.save_file({"w": ones(LARGE // 8)}, folder / "adapter_model.safetensors")


def of_tokenizers(folder: Path) -> None:
    Tokenizer(WordLevel({f"{number:0>100}": number for number in range(LARGE // 100)}, unk_token="?")).save(str(folder / "tokenizer.json"))


WRITERS: list[Callable[[Path], None]] = [plain, of_safetensors, of_tokenizers]


def fails(store: CheckpointStore, folder: Path, fill: Callable[[Path], None], message: str, step: int = 2) -> None:
    """Writing raises that error, and nothing but the checkpoints of before is left."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match=message):
        store.write(step, fill)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert all(not one.problems for one in store.examined())


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips where this process may not mount one."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs needs privileges: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no command mount")
def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        store = CheckpointStore(disk)
        store.write(1, small)
        for fill in WRITERS:
            fails(
                store, disk, fill, rf"checkpoint-2 could not be written to .* \(No space left on device\): {RULE}; free space on its disk"
            )
            fails(store, disk, fill, "No space left on device", step=1)
        # Full to the last byte: not even a folder or `latest` fits.
        with pytest.raises(OSError, match="No space"), (disk / "other").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        fails(store, disk, small, "No space left on device")
        (disk / "other").unlink()
        store.write(2, small)
        assert [one.step for one in store.checkpoints()] == [1, 2]


@pytest.mark.parametrize("fill", WRITERS)
def test_a_limit_on_file_sizes(fill: Callable[[Path], None], tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.write(1, small)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE // 4, before[1]))
    try:
        fails(store, tmp_path, fill, rf"\(File too large\): {RULE}; raise the limit on file sizes")
        fails(store, tmp_path, fill, "File too large", step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.write(2, small)
    assert [one.step for one in store.checkpoints()] == [1, 2]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere; as somebody else for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path(".")  # nobody may not even enter the folders above
    store = CheckpointStore(here)
    for step in (1, 2, 3):
        store.write(step, small)
    tmp_path.chmod(0o555)
    try:
        with as_nobody():
            fails(store, here, small, rf"\(Permission denied\): {RULE}; change the permissions of the folder", step=4)
            fails(store, here, small, "Permission denied", step=3)
            with pytest.raises(CheckpointError, match=r"old checkpoints in .* could not be deleted \(Permission denied\)"):
                store.prune(1, None)
            assert store.latest == store.newest_good().checkpoint == store.checkpoints()[2]
    finally:
        tmp_path.chmod(0o755)
    store.write(4, small)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore(Path("."))
    for step in (1, 2):
        store.write(step, small)
    (tmp_path / "checkpoint-2").chmod(0)
    tmp_path.chmod(0o755)
    try:
        with as_nobody():
            found = store.newest_good()
            assert found.checkpoint is not None and found.checkpoint.step == 1
            assert [(one.checkpoint.step, one.problems) for one in found.rejected] == [
                (2, ("manifest.json cannot be read (Permission denied)",))
            ]
        tmp_path.chmod(0)
        with as_nobody(), pytest.raises(CheckpointError, match=r"cannot be listed \(Permission denied\).*one that you may read"):
            store.newest_good()
    finally:
        (tmp_path / "checkpoint-2").chmod(0o755)
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_failing_device_at_any_sync(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.write(1, small)
    count = 0
    real = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", failing)
    # file, folder, manifest, folder, the old one's new name, the new one's, latest, the folder
    with pytest.raises(CheckpointError, match=r"Input/output error.*check its disk and file system"):
        store.write(1, small)
    assert [one.problems for one in store.examined()] == [()]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".staging", ".partial"))]
    store.write(2, small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "latest"]


def test_errors_without_a_number_keep_their_words(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError("the cable is out")

    with pytest.raises(CheckpointError, match="the cable is out"):
        CheckpointStore(tmp_path).write(1, fill)
    with pytest.raises(CheckpointError, match="No such file or directory"):
        CheckpointStore(tmp_path / "none").write(1, small)


def test_a_file_in_a_checkpoints_place_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").write_text("mine")
    with pytest.raises(CheckpointError, match="Not a directory"):
        CheckpointStore(tmp_path).write(1, small)
    assert (tmp_path / "checkpoint-1").read_text() == "mine"
