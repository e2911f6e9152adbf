"""What is checked of a data file before a reader of the datasets library sees it: bytes, lines, header and width of rows."""

import codecs
import contextlib
import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adakron.errors import DataError

LONGEST_CELL = 16 * 2**20
"""Most characters of a csv or tsv cell, and most bytes of a line of a jsonl file."""

MOST_COLUMNS = 10_000

_CHUNK = 2**20


def check_file(path: Path, *, text: bool) -> None:
    """Raise DataError where the file cannot be read or is empty and, of a text format, where its bytes are no UTF-8 text.

    The file is read in pieces, so its size does not matter.
    """
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: no permission; change its permissions, or name another file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; it must hold at least one example")
    if text:
        _check_bytes(path, lines=path.suffix.lower() == ".jsonl")


def _check_bytes(path: Path, *, lines: bool) -> None:
    """UTF-8 (the JSON reader lets some malformed bytes through) without NUL, which an archive has and text has not."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, start, position = 1, 0, 0  # of the line; where it starts; of the chunk
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise DataError(_place(path, error.object, error.start, number, start, position - pending)) from error
            if not chunk:
                return
            nul = chunk.find(b"\0")
            if nul >= 0:
                raise DataError(_place(path, chunk, nul, number, start, position))
            newline = chunk.find(b"\n")
            if lines and (newline if newline >= 0 else len(chunk)) + position - start > LONGEST_CELL:
                raise DataError(
                    f"{path}, line {number}: more than {LONGEST_CELL:,} bytes; a line must be one example (is it jsonl? a list of"
                    " examples must be called .json)"
                )
            number += chunk.count(b"\n")
            start = position + chunk.rindex(b"\n") + 1 if newline >= 0 else start
            position += len(chunk)


def _place(path: Path, content: bytes, at: int, number: int, start: int, position: int) -> str:
    """The message on a bad byte: content starts at `position` of the file, in line `number`, which starts at `start`."""
    line = number + content.count(b"\n", 0, at)
    newline = content.rfind(b"\n", 0, at)
    column = at - newline if newline >= 0 else position + at - start + 1
    what = "is not UTF-8; convert the file to UTF-8" if content[at] else "is NUL, which text has not; is it an archive, or UTF-16?"
    return f"{path}, line {line}: byte {column} ({content[at]:#04x}) {what}"


def check_table(path: Path, dialect: Mapping[str, Any]) -> list[str]:
    """The names of the columns of a csv or tsv file. Raises DataError on its header or rows, csv.Error where it is no table."""
    with path.open(encoding="utf-8-sig", newline="") as file, _cells_up_to(LONGEST_CELL):
        rows = csv.reader(file, **dialect)
        header = next(rows, [])
        check_header(path, header)
        first_line = rows.line_num + 1
        check_widths(path, ((row, rows.line_num) for row in rows), len(header), first_line)
    return header


@contextlib.contextmanager
def _cells_up_to(characters: int) -> Iterator[None]:
    """Let the csv module read cells of that length; its own limit is 131,072 characters."""
    before = csv.field_size_limit(characters)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def check_header(path: Path, header: Sequence[str]) -> None:
    """Raise DataError where the first line does not name every column once."""
    counts = Counter(header)
    repeated = next((name for name in header if counts[name] > 1), None)
    if len(header) > MOST_COLUMNS:
        found = f"{len(header):,} columns (at most {MOST_COLUMNS:,} are read)"
    elif repeated is not None:
        found = f"the column {repeated!r} twice"
    elif not header:
        found = "no header line"
    elif "" in header:
        found = f"no name for column {header.index('') + 1}"
    else:
        return
    raise DataError(f"{path} has {found}; its first line must name every column once")


def check_widths(path: Path, rows: Iterable[tuple[list[str], int]], width: int, line: int) -> None:
    """Refuse rows of another width than the header's: the loader would shift their cells to other columns, or make cells up.

    rows: each with the number of its last line, for a quoted cell may hold line ends. line: the number of the first row's first.
    """
    first = None
    bad = 0
    for row, last_line in rows:
        blank = not row or (len(row) == 1 and row[0].isspace())  # the loader skips these lines
        if len(row) != width and not blank:
            bad += 1
            first = first or (line, len(row))
        line = last_line + 1
    if first:
        line, fields = first
        count = f" ({bad} such rows in all)" if bad > 1 else ""
        remedy = "no cell may hold a tab" if path.suffix.lower() == ".tsv" else "quote cells that hold a comma, and close every quote"
        raise DataError(
            f"{path} line {line} has {fields} field{'' if fields == 1 else 's'}, the header has {width}{count}; "
            f"every row must have as many as the header ({remedy})"
        )
