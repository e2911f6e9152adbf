"""Published files: whole or not at all, durable in the right order, nothing left over."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from adakron import atomic
from adakron.atomic import publish


def test_the_file_appears_whole_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_text("old")
    with publish(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old" and partial.parent == tmp_path
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), publish(file) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_content_is_synced_before_the_name_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"file of {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def replaced(*names: Any) -> None:
        events.append("name")
        replace(*names)

    monkeypatch.setattr(atomic.os, "fsync", synced)
    monkeypatch.setattr(atomic.os, "replace", replaced)
    with publish(tmp_path / "a.bin") as partial:
        partial.write_text("1234")
    assert events == ["file of 4", "name", "folder"]


@pytest.mark.parametrize(("number", "harmless"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced(number: int, harmless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def synced(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", synced)
    if harmless:
        with publish(tmp_path / "a.bin") as partial:
            partial.write_text("new")
    else:
        with pytest.raises(OSError, match="Input/output error"), publish(tmp_path / "a.bin") as partial:
            partial.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_tree_is_synced_whole_and_its_folders_after_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "a").write_text("1")
    (tmp_path / "tree" / "b").write_text("12")
    (tmp_path / "tree" / "link").symlink_to(tmp_path)
    synced: list[Path] = []
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    atomic.sync_tree(tmp_path / "tree")
    tree = tmp_path / "tree"
    assert sorted(synced) == sorted([tree, tree / "inner", tree / "inner" / "a", tree / "b"])
    assert synced[-1] == tree and synced.index(tree / "inner" / "a") < synced.index(tree / "inner")


def test_a_renamed_folder_is_synced_after_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    seen: list[tuple[Path, bool]] = []
    monkeypatch.setattr(
        atomic.os,
        "fsync",
        lambda descriptor: seen.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), (tmp_path / "new").is_dir())),
    )
    atomic.rename_folder(tmp_path / "old", tmp_path / "new")
    assert seen == [(tmp_path, True)]


def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught, publish(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write does it, which knows no name
    assert caught.value.filename == str(tmp_path / "file")
