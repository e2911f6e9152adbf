"""The manifest of a checkpoint folder: which files belong to it, their sizes and SHA-256, so that damage is seen before loading."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adakron.atomic import publish
from adakron.errors import CheckpointError
from adakron.untrusted import UnreadableError, read_json

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
"""Raised whenever an older program would misread a newer manifest."""


@dataclass(frozen=True)
class _Entry:
    """size: in bytes. sha256: 64 lower-case hexadecimal digits."""

    size: int
    sha256: str


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files below the folder: the last file of a checkpoint, it makes the others count.

    Raises CheckpointError where the folder holds no file, or a link or device, whose content no manifest can promise.
    """
    files = {name: {"size": path.stat().st_size, "sha256": _digest(path)} for name, path in sorted(_files(folder, ""))}
    if not files:
        raise CheckpointError(f"{folder} holds no file: a checkpoint without content is none; write its files before its manifest")
    with publish(folder / MANIFEST_FILE) as partial:
        partial.write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> list[str]:
    """What is wrong with the files of a folder, one clause each; empty where all are there as the manifest says.

    Every byte of a listed file is read. Files that no manifest lists are nobody's promise, and tolerated.
    """
    try:
        entries = _read(folder)
    except _UnusableError as reason:
        return [str(reason)]
    return [problem for name, entry in entries.items() if (problem := _problem(folder, name, entry))]


class _UnusableError(Exception):
    """There is no manifest that says anything; the message says why."""


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), f"{name}/")
        elif not entry.is_file(follow_symlinks=False):
            raise CheckpointError(f"{entry.path} is a link or a device: a checkpoint holds plain files only; write the content itself")
        elif name != MANIFEST_FILE:
            if any("\ud800" <= letter <= "\udfff" for letter in name):  # what Python makes of bytes that are not UTF-8
                raise CheckpointError(f"{folder} holds a file whose name is not UTF-8 ({name!r}), which no manifest can hold; rename it")
            yield name, Path(entry.path)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, _Entry]:
    file = folder / MANIFEST_FILE
    try:
        if not folder.is_dir():
            raise _UnusableError("it is no folder")
        if not stat.S_ISREG(file.lstat().st_mode):
            raise _UnusableError(f"{MANIFEST_FILE} is not a plain file")
        content = read_json(file)
    except FileNotFoundError:
        raise _UnusableError(f"it holds no {MANIFEST_FILE}: written by an older version of this program, or half-written") from None
    except OSError as error:
        raise _UnusableError(f"{MANIFEST_FILE} cannot be read ({error.strerror})") from error
    except UnreadableError as error:
        raise _UnusableError(f"{MANIFEST_FILE} is damaged: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise _UnusableError(f"{MANIFEST_FILE} has format {version}, and this version of the program reads {FORMAT_VERSION}: update it")
    if type(version) is not int or version != FORMAT_VERSION or not _is_listing(content.get("files")):
        raise _UnusableError(f"{MANIFEST_FILE} is damaged: it is no list of files with sizes and SHA-256")
    return {name: _Entry(entry["size"], entry["sha256"]) for name, entry in content["files"].items()}


def _is_listing(files: Any) -> bool:
    return isinstance(files, dict) and bool(files) and all(_is_entry(entry) for entry in files.values())


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is not None
    )


def _problem(folder: Path, name: str, entry: _Entry) -> str | None:
    parts = name.split("/")
    shown = name if name.isprintable() else repr(name)  # anybody may have written it, and terminals obey what they show
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name:
        return f"{MANIFEST_FILE} names {name!r}, which is no file inside the folder"
    try:
        path = folder
        for part in parts:
            path /= part
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                return f"{shown} is, or lies behind, a link: the content may be anything"
        if not stat.S_ISREG(mode):
            return f"{shown} is not a plain file"
        size = path.stat().st_size
        if size != entry.size:
            return f"{shown} has {size:,} bytes, and was written with {entry.size:,}"
        if _digest(path) != entry.sha256:
            return f"{shown} has other content than was written (SHA-256 differs)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{shown} is missing"
    except OSError as error:
        return f"{shown} cannot be read ({error.strerror})"
    return None
