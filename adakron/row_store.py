"""Rows of a long job, kept as they are finished: whoever kills it, it goes on later with what is missing, on any number of ranks.

While a job is under way a folder holds one file per rank: a line of JSON that says what the rows belong to, then a line per row,
appended and on the disk before `append` returns. A row is a JSON object with its `index`. What a killed writer left of a last line is
taken off by the next one. All ranks must see the same folder.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adakron.atomic import rename_folder, sync_folder
from adakron.errors import ConfigError
from adakron.run_lock import LOCK_FILE

FORMAT_VERSION = 1
_PARTS = "rows-rank*.jsonl"

Row = dict[str, Any]


class RowStore:
    """The rows of a job in a folder.

    description: what the rows belong to, in plain values; a folder that belongs to something else is refused. count: rows of the whole job.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], count: int):
        self.folder = folder
        self.count = count
        self._header: Row = {"format": FORMAT_VERSION, "rows": count, **description}

    def recover(self) -> dict[int, Row]:
        """The finished rows by index, after taking off half-written lines. Only one process may call it, while nobody writes.

        Raises ConfigError, naming what differs, where the folder holds rows of something else.
        """
        found: dict[int, Row] = {}
        for file in sorted(self.folder.glob(_PARTS)):
            lines, whole = _whole_lines(file.read_bytes())
            if lines:
                self._check(lines[0], file)
            for row in lines[1:]:
                index = row.get("index")
                if not isinstance(index, int) or not 0 <= index < self.count:
                    raise ConfigError(f"{file} holds a row of index {index!r}, where 0 to {self.count - 1} are; delete {self.folder}")
                # Of a row that is there twice (a file that was copied) the first counts.
                found.setdefault(index, row)
            if whole < file.stat().st_size:
                with file.open("r+b") as stream:
                    stream.truncate(whole)
                    os.fsync(stream.fileno())
        return found

    def _check(self, header: Row, file: Path) -> None:
        expected = json.loads(json.dumps(self._header))
        names = [name for name in {**expected, **header} if header.get(name) != expected.get(name)]
        if names:
            differences = ", ".join(f"{name} was {_shown(header.get(name))}, now {_shown(expected.get(name))}" for name in names)
            raise ConfigError(
                f"{self.folder} holds rows that were made otherwise: {differences}; repeat the settings to go on, name another file"
                " (--output_file), or delete that folder to begin again"
            )

    @contextmanager
    def writer(self, rank: int) -> Iterator["RowWriter"]:
        """Appends to this rank's file, which is made where there is none. After `recover`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = RowWriter(self.folder / _PARTS.replace("*", str(rank)), self._header)
        try:
            yield writer
        finally:
            writer.close()

    def remove(self) -> None:
        """Delete the folder, whose rows are in their place by now, with what was written here. Twice does no harm.

        It steps aside in one rename, so a killed call leaves no part of the rows under its name.
        """
        aside = self.folder.with_name(f".{self.folder.name}.deleted")
        if self.folder.is_dir():
            _delete(aside)  # of a killed call
            rename_folder(self.folder, aside)
        _delete(aside)


def holds_rows(folder: Path) -> bool:
    """Whether a job is under way there, or was killed."""
    return any(folder.glob(_PARTS))


def _delete(folder: Path) -> None:
    for file in [*folder.glob(_PARTS), folder / LOCK_FILE]:
        file.unlink(missing_ok=True)
    # Network file systems keep a lock that is still open under another name; what else lies there is somebody's.
    with suppress(OSError):
        folder.rmdir()


class RowWriter:
    """Appends rows to a file that has a header."""

    def __init__(self, file: Path, header: Row):
        self._file = file
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if os.fstat(self._descriptor).st_size == 0:
            self.append([header])
            sync_folder(file.parent)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows; they are on the disk when this returns."""
        content = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
            os.fsync(self._descriptor)
        except OSError as error:  # of a full disk; a descriptor's errors know no name
            error.filename = str(self._file)
            raise

    def close(self) -> None:
        """No more rows."""
        os.close(self._descriptor)


def _whole_lines(content: bytes) -> tuple[list[Row], int]:
    """The objects of the leading lines that are whole, and the bytes that they take: a killed writer or a power cut leaves the rest."""
    found: list[Row] = []
    whole = 0
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            break
        found.append(row)
        whole += len(line)
    return found, whole


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
