"""Data files of all formats that are broken, huge, or something else than their names say."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.fuzzing import pick
from tests.helpers.hostile.values import mutate, plain, word

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

Rows = list[dict[str, Any]]


def good_rows(count: int = 6) -> Rows:
    """Rows that every format takes."""
    return [{"idx": row, "sentence": f"the film is good {row}", "label": row % 2} for row in range(count)]


def encoded(rows: Rows, suffix: str) -> bytes:
    """The rows in a format."""
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    delimiter = "," if suffix == ".csv" else "\t"
    return "".join(delimiter.join(map(str, line)) + "\n" for line in [list(rows[0]), *(row.values() for row in rows)]).encode()


def _archive(inner: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        entry = tarfile.TarInfo("../../owned")
        entry.size = len(inner)
        archive.addfile(entry, io.BytesIO(inner))
    return sink.getvalue()


def _zip(inner: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("../../owned", inner)
    return sink.getvalue()


BYTES: dict[str, Callable[[np.random.Generator, bytes, str], bytes]] = {
    "empty": lambda rng, good, suffix: b"",
    "one line end": lambda rng, good, suffix: b"\n",
    "many line ends": lambda rng, good, suffix: b"\n" * 5000,
    "header only": lambda rng, good, suffix: good.split(b"\n")[0] + b"\n",
    "truncated": lambda rng, good, suffix: good[: int(rng.integers(1, len(good)))],
    "flipped": lambda rng, good, suffix: _flipped(rng, good),
    "noise": lambda rng, good, suffix: rng.bytes(int(rng.integers(1, 5000))),
    "bad utf-8": lambda rng, good, suffix: good.replace(b"good", b"g\xff\xfed", 1),
    "latin-1": lambda rng, good, suffix: good.replace(b"good", "göod".encode("latin-1")),
    "utf-16": lambda rng, good, suffix: good.decode("latin-1").encode("utf-16"),
    "byte order mark": lambda rng, good, suffix: b"\xef\xbb\xbf" + good,
    "two byte order marks": lambda rng, good, suffix: b"\xef\xbb\xbf" * 2 + good,
    "nul": lambda rng, good, suffix: good.replace(b"film", b"fi\x00m"),
    "zeros": lambda rng, good, suffix: bytes(100_000),
    "carriage returns": lambda rng, good, suffix: good.replace(b"\n", b"\r"),
    "quote": lambda rng, good, suffix: good.replace(b"film", b'"film', 1),
    "quotes": lambda rng, good, suffix: b'"' * int(rng.integers(1, 4000)),
    "ragged": lambda rng, good, suffix: good + b"a,b,c,d,e\nx\n",
    "columns": lambda rng, good, suffix: (b",".join(b"c%d" % n for n in range(3000)) + b"\n") * 3,
    "gzip": lambda rng, good, suffix: gzip.compress(good),
    "bomb": lambda rng, good, suffix: gzip.compress(bytes(50_000_000), 9),
    "tar": lambda rng, good, suffix: _archive(good),
    "zip": lambda rng, good, suffix: _zip(good),
    "pickle": lambda rng, good, suffix: b"cos\nsystem\n(S'touch owned'\ntR.",
    "python": lambda rng, good, suffix: b"import os\nos.system('touch owned')\n",
    "html": lambda rng, good, suffix: b"<!DOCTYPE html><html><body>404</body></html>\n",
    "open list": lambda rng, good, suffix: b"[" * 100_000,
    "open objects": lambda rng, good, suffix: b'{"sentence":' * 20_000,
    "deep row": lambda rng, good, suffix: b'{"sentence": ' + b"[" * 900 + b"]" * 900 + b', "label": 1}\n',
    "number row": lambda rng, good, suffix: b"1\n2\n3\n",
    "huge number": lambda rng, good, suffix: b'{"sentence": "a", "label": ' + b"9" * 5000 + b"}\n",
    "nan": lambda rng, good, suffix: b'{"sentence": "a", "label": NaN}\n{"sentence": "b", "label": -Infinity}\n',
    "key twice": lambda rng, good, suffix: b'{"sentence": "a", "sentence": "b", "label": 1}\n' * 2,
    "surrogate": lambda rng, good, suffix: b'{"sentence": "\\ud800 a", "label": 1}\n{"sentence": "b", "label": 0}\n',
    "formula": lambda rng, good, suffix: good.replace(b"the film", b"=cmd|' /C calc'!A0"),
    "other format": lambda rng, good, suffix: encoded(good_rows(), pick(rng, SUFFIXES)),
    "magic only": lambda rng, good, suffix: b"PAR1PAR1",
    "large footer": lambda rng, good, suffix: b"PAR1" + bytes(20) + b"\xff\xff\xff\x7fPAR1",
}

LARGE: dict[str, Callable[[str], bytes]] = {
    "gigantic line": lambda suffix: encoded([{"idx": 0, "sentence": "x" * 30_000_000, "label": 1}, *good_rows()], suffix),
    "gigantic words": lambda suffix: encoded([{"idx": 0, "sentence": "good film " * 2_000_000, "label": 1}, *good_rows()], suffix),
    "gigantic name": lambda suffix: encoded([{"sentence": "a", "label": 1, "x" * 4_000_000: 1}], suffix),
    "many columns": lambda suffix: b",".join(b"c%d" % number for number in range(300_000)) + b"\n",
    "no line end": lambda suffix: b"a" * 40_000_000,
    "gigantic quote": lambda suffix: b'sentence,label\n"' + b"x\n" * 3_000_000,
}


def _flipped(rng: np.random.Generator, good: bytes) -> bytes:
    content = bytearray(good)
    for _ in range(int(rng.integers(1, 8))):
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
    return bytes(content)


def hostile_rows(rng: np.random.Generator) -> tuple[Rows, str]:
    """Rows with values, columns or labels that do not fit."""
    rows = good_rows(int(rng.integers(1, 9)))
    kind = pick(rng, ("values", "labels", "same id", "column", "missing", "null", "many classes", "text labels", "spaces", "escapes"))
    if kind == "values":
        for _ in range(int(rng.integers(1, 4))):
            row = int(rng.integers(len(rows)))
            rows[row], _touched = mutate(rows[row], rng)
    for number, row in enumerate(rows):
        if kind == "labels" and rng.random() < 0.5:
            row["label"] = pick(rng, (2, -1, 7, "x", "", None, 0.5, 10**18, True, [1], {"a": 1}, "nan", "1.0", 1e300, "९"))
        elif kind == "same id":
            row["idx"] = 0
        elif kind == "column":
            row[pick(rng, ("sentence ", "Label", "\x1b[31m", "", "sentence.x", "__index_level_0__", "a" * 3000))] = plain(rng)
        elif kind == "missing" and rng.random() < 0.4:
            row.pop(pick(rng, list(row)), None)
        elif kind == "null" and rng.random() < 0.5:
            row[pick(rng, ("sentence", "label"))] = None
        elif kind == "many classes":
            row["label"] = f"class {number}"
        elif kind == "text labels":
            row["label"] = word(rng).encode("utf-8", "replace").decode()
        elif kind == "spaces":
            row["sentence"] = pick(rng, ("", " ", "\t", "\n\n", "\u2028", "\x0b\x0c", "[PAD] [CLS] [MASK]", "\x00", "a\x00b"))
        elif kind == "escapes":
            row["label"] = "\x1b[2J\x1b]0;owned\x07" if number % 2 else "\u202egood"
    return rows, kind


def hostile(rng: np.random.Generator, folder: Path, name: str) -> tuple[Path, str]:
    """Write a file (or something else) called `name` with an ending of a format; the path and what is wrong with it."""
    suffix = pick(rng, SUFFIXES)
    path = folder / f"{name}{suffix}"
    how = rng.random()
    if how < 0.09:
        return special(
            path, pick(rng, ("pipe", "loop", "dangling", "folder", "socket name", "link to device", "unreadable"))
        ), f"special {suffix}"
    if how < 0.15:
        return odd_name(rng, folder, suffix), "odd name"
    if how < 0.65:
        kind = pick(rng, sorted(BYTES))
        path.write_bytes(BYTES[kind](rng, encoded(good_rows(), suffix), suffix))
        return path, kind
    rows, kind = hostile_rows(rng)
    try:
        content = encoded(rows, suffix)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # parquet has no columns of mixed kinds
        path = path.with_suffix(".jsonl")
        content = encoded(rows, ".jsonl")
    path.write_bytes(content)
    return path, kind


def special(path: Path, kind: str) -> Path:
    """Something that is no file at that path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to device":
        path.symlink_to("/dev/zero")
    elif kind == "unreadable":
        path.write_bytes(encoded(good_rows(), path.suffix))
        path.chmod(0)
    return path


def odd_name(rng: np.random.Generator, folder: Path, suffix: str) -> Path:
    """A good file under a name that a reader may take for a pattern or an address."""
    name = pick(
        rng, ("a[1]", "a*", "a?b", "{a}", "a::b", "hf:x", "a b", "é", "-a", "a%20b", "~a", "a#b", "a\\b", "zip:x", "a@b", "x\x1b[31m")
    )
    path = folder / f"{name}{suffix}"
    path.write_bytes(encoded(good_rows(), suffix))
    return path
