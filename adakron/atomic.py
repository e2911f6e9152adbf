"""Files and folders that a reader sees whole or not at all, whatever happens to the process or the machine."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a file system answers that cannot sync a folder (some network ones); it then has its own order of writes.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


_PARTIAL = re.compile(r"\.(.+)\.[0-9]+\.partial")


@contextmanager
def publish(file: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """For a block that writes a file under the hidden name it is given; at the end of the block the file gets its own name.

    The content is on the disk before the name is, and the name before this returns, so neither a killed process nor a power cut
    leaves half a file under it. An exception in the block, or a full disk, leaves what was there before and no partial file; a
    killed process leaves its partial file, `.NAME.PID.partial`. One writer per file at a time in a process. The folder must exist.

    durable: False for a file that is worth nothing after a power cut: it does not wait for the disk.
    """
    file = Path(file)
    # The same folder, so that the rename stays inside one file system and is atomic.
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, file)
    except OSError as error:
        if error.filename is None:  # a full disk is met by a write, which knows no name
            error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync_folder(file.parent)


def published_name(entry: str) -> str | None:
    """The name of the file that an entry is the partial file of, as `publish` calls it; None where it is none."""
    match = _PARTIAL.fullmatch(entry)
    return match[1] if match else None


def rename_folder(source: Path, target: Path) -> None:
    """Give a folder another name beside its own, on the disk before this returns. The target must not exist.

    For a folder that appears whole, call `sync_tree` on it first.
    """
    source.rename(target)
    sync_folder(target.parent)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below a folder, and last the folder itself, onto the disk. Follows no links."""
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            sync_tree(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            _sync(Path(entry.path))
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk, where its file system can."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
