"""Files that a reader sees whole or not at all, whatever happens to the process or the machine."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a file system answers that cannot sync a folder (some network ones); it then has its own order of writes.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def publish(file: str | Path) -> Iterator[Path]:
    """For a block that writes a file under the hidden name it is given; at the end of the block the file gets its own name.

    The content is on the disk before the name is, and the name before this returns, so neither a killed process nor a power cut
    leaves half a file under it. An exception in the block, or a full disk, leaves what was there before and no partial file; a
    killed process leaves its partial file, `.NAME.PID.partial`. One writer per file at a time in a process. The folder must exist.
    """
    file = Path(file)
    # The same folder, so that the rename stays inside one file system and is atomic.
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    try:
        _sync(file.parent)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
