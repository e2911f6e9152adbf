"""Where a task's raw splits come from: files named one by one, a folder, or GLUE on the hub.

Files are read by the datasets library; what goes wrong there ends in a DataError that names the file, the place and the flag.
"""

import contextlib
import csv
import glob
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets

from adakron.config import DataConfig
from adakron.errors import DataError
from adakron.tasks.text_files import check_file, check_table
from adakron.untrusted import kind_of

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
GLUE_ON_HUB = "nyu-mll/glue"
MATCHED = "_matched"

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_LONGEST_INTEGER = 308  # digits; longer ones are beyond a float, which the JSON reader falls back to
_TOO_DEEP = "lists and objects inside one another, too many to read"
FILE_FLAGS = {"train": "train_file", "validation": "validation_file", "test": "test_file"}
"""The settings that name a split's file."""


@dataclass(frozen=True)
class RawSplit:
    """A split as it was read, and what to call its source in messages."""

    dataset: datasets.Dataset
    source: str


Reader = Callable[[Path], datasets.Dataset | None]
"""Reads a file of a form of its own; None where the file has not that form. Raises DataError where it has it, damaged."""


def load_raw_splits(
    data: DataConfig, splits: Sequence[str], hub_task: str | None = None, readers: Mapping[str, Reader] | None = None
) -> dict[str, RawSplit]:
    """The splits that exist, in the order of `splits`; of each, train_file and its kind win over data_dir.

    A folder holds a split as <split>.jsonl, .json, .csv, .tsv or .parquet (or as <split>-00000-of-00001.parquet and so on);
    MNLI's "validation" may also be called "validation_matched" there, its "test" "test_matched". hub_task: the GLUE task to
    load from the hub where the settings name no file and no folder. readers: a task's own, by the endings of their files, which
    may be further ones.

    Raises DataError with everything that is missing or unreadable.
    """
    readers = readers or {}
    suffixes = tuple(dict.fromkeys((*SUFFIXES, *readers)))
    named = {split: Path(value).expanduser() for split, flag in FILE_FLAGS.items() if (value := getattr(data, flag)) and split in splits}
    if not named and data.data_dir is None:
        if hub_task is None:
            raise DataError(
                f"task {data.task_name} has no data; give --train_file and --validation_file, or --data_dir with train and validation "
                f"files ({', '.join(suffixes)})"
            )
        return _load_from_hub(hub_task, splits)
    missing = {FILE_FLAGS[split]: path for split, path in named.items() if not path.is_file()}
    problems = [f"{flag} is {path}, which {_why_not_a_file(path)} (set --{flag})" for flag, path in missing.items()]
    files: dict[str, list[Path]] = {split: [path] for split, path in named.items()}
    if data.data_dir is not None:
        found, folder_problems = _search_folder(
            Path(data.data_dir).expanduser(), [split for split in splits if split not in named], suffixes
        )
        if not found and not named and not folder_problems:
            folder_problems = [
                f"data_dir is {data.data_dir}, which holds {_listing(Path(data.data_dir).expanduser())}; it must hold train and validation "
                f"files named <split>{'|'.join(suffixes)}, or files must be named with --train_file, --validation_file, --test_file"
            ]
        files |= found
        problems += folder_problems
    loaded: dict[str, RawSplit] = {}
    for split in [] if problems else [split for split in splits if split in files]:
        try:
            loaded[split] = RawSplit(_read(files[split], readers), f"{split} split ({files[split][0]})")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return loaded


def _why_not_a_file(path: Path) -> str:
    if path.is_dir():
        return f"is a folder that holds {_listing(path)}; it must be a file"
    if path.is_symlink():
        return "is a link that leads to no file"
    if path.exists():
        return f"is {kind_of(path.stat().st_mode)}; it must be a regular file"
    if path.parent.is_dir():
        return f"does not exist; {path.parent} holds {_listing(path.parent)}"
    return f"does not exist, nor does the folder {path.parent}"


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"


def _search_folder(folder: Path, splits: Sequence[str], suffixes: Sequence[str]) -> tuple[dict[str, list[Path]], list[str]]:
    if not folder.is_dir():
        return {}, [f"data_dir is {folder}, which is {'a file' if folder.exists() else 'missing'}; it must be a folder (set --data_dir)"]
    found: dict[str, list[Path]] = {}
    problems = []
    for split in splits:
        stems = (split, split + MATCHED) if f"{split}_mismatched" in splits else (split,)
        candidates = [[path] for stem in stems for suffix in suffixes if (path := folder / f"{stem}{suffix}").is_file()]
        candidates += [shards for stem in stems if (shards := sorted(folder.glob(f"{stem}-*-of-*.parquet")))]
        if len(candidates) > 1:
            names = ", ".join(files[0].name for files in candidates)
            problems.append(f"data_dir {folder} holds several files for {split}: {names}; keep one, or name one by its flag")
        elif candidates:
            found[split] = candidates[0]
    return found, problems


def _load_from_hub(task: str, splits: Sequence[str]) -> dict[str, RawSplit]:
    try:
        with _quiet():
            everything = datasets.load_dataset(GLUE_ON_HUB, task)
    except Exception as error:  # the hub client's errors have no common base: offline, unknown host, timeout, no such repository
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"GLUE's {task} cannot be loaded from the hub ({GLUE_ON_HUB}): {reason}; name its files with --train_file and "
            f"--validation_file, or their folder with --data_dir (train and validation: {', '.join(SUFFIXES)})"
        ) from error
    names = {split: name for split in splits for name in (split, split + MATCHED) if name in everything}
    return {split: RawSplit(everything[name], f"{name} split ({GLUE_ON_HUB}, {task})") for split, name in names.items()}


def _read(files: Sequence[Path], readers: Mapping[str, Reader]) -> datasets.Dataset:
    path = files[0]
    suffix = path.suffix.lower()
    builder = _BUILDERS.get(suffix)
    if builder is None and suffix not in readers:
        known = ", ".join(dict.fromkeys((*SUFFIXES, *readers)))
        flags = "--train_file, --validation_file, --test_file, --data_dir"
        raise DataError(f"{path} has the ending {path.suffix!r}; it must be one of {known}; name another file ({flags})")
    if suffix in readers:
        check_file(path, text=True)
        dataset = readers[suffix](path)
        if dataset is not None or builder is None:
            assert dataset is not None, f"{suffix} has no other reader"
            return dataset
    for file in files:
        check_file(file, text=builder != "parquet")
    options = _csv_options(path) if builder == "csv" else {}
    # The library reads names as patterns and addresses; a name that is neither stands for itself.
    names = [glob.escape(str(file.absolute())) for file in files]
    try:
        with _quiet(), _cache_folder() as cache:
            loaded = datasets.load_dataset(builder, data_files={"rows": names}, split="rows", **cache, **options)
        if builder == "parquet":
            loaded.data.table.validate(full=True)  # its texts are taken for UTF-8 unseen
    except Exception as error:  # the readers' errors (pyarrow, pandas, datasets) have no common base
        raise DataError(_diagnosis(path, error)) from error
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Load without progress bars and without the library's own error lines, which only repeat ours."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _cache_folder() -> Iterator[dict[str, Any]]:
    """Options that make the library work where its cache folder cannot be written to: a short-lived one, rows in memory."""
    try:
        os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
        with tempfile.TemporaryFile(dir=datasets.config.HF_DATASETS_CACHE):
            pass
    except OSError:
        with tempfile.TemporaryDirectory() as folder:
            yield {"cache_dir": folder, "keep_in_memory": True}
    else:
        yield {}


def _csv_options(path: Path) -> dict[str, Any]:
    """Read every cell as text: "NA" and "null" are words, and "007" is not a number. TSV, as GLUE's, has no quoting."""
    tsv = path.suffix.lower() == ".tsv"
    dialect: Mapping[str, Any] = {"delimiter": "\t" if tsv else ",", "quoting": csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL}
    try:
        header = check_table(path, dialect)
    except csv.Error as error:
        raise DataError(_diagnosis(path, error)) from error
    return {**dialect, "keep_default_na": False, "features": datasets.Features({name: datasets.Value("string") for name in header})}


def _diagnosis(path: Path, error: Exception) -> str:
    """Say where a file cannot be read: the readers report offsets into their own buffers."""
    if _BUILDERS[path.suffix.lower()] == "json":
        with path.open(encoding="utf-8-sig") as file:
            problem = _json_problem(file)
        if problem:
            return f"{path}, {problem}"
    # pyarrow's words for a table without rows are about the batches that it would make of them.
    if "corresponds to no data" in str(error) or "BatchSize must be greater than 0" in str(error.__cause__):
        return f"{path} holds no rows; it must hold at least one example"
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    return f"{path} cannot be read as {path.suffix[1:]}: {reason}"


def _json_problem(file: TextIO) -> str | None:
    first = True
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            return _json_list_problem(line + file.read(), number)
        first = False
        try:
            row = json.loads(line, parse_int=_json_integer)
        except json.JSONDecodeError as error:
            return f"line {number}: {error.msg} (column {error.colno}); every line must be one JSON object"
        except (ValueError, RecursionError) as error:
            return f"line {number}: {_TOO_DEEP if isinstance(error, RecursionError) else error}; every line must be one JSON object"
        if not isinstance(row, dict):
            return f"line {number}: a JSON {type(row).__name__}, not an object; every line must be one JSON object"
    return None


def _json_list_problem(text: str, line: int) -> str | None:
    """What is wrong with a list that starts on that line."""
    try:
        json.loads(text, parse_int=_json_integer)
    except json.JSONDecodeError as error:
        return f"line {line - 1 + error.lineno}: {error.msg} (column {error.colno}); it must be a JSON list of objects"
    except (ValueError, RecursionError) as error:
        return f"{_TOO_DEEP if isinstance(error, RecursionError) else error}; it must be a JSON list of objects"
    return None


def _json_integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"a whole number of {len(digits)} digits; at most {_LONGEST_INTEGER} can be read (write it as a string)")
    return int(digits)
