"""Tokenised splits as flat arrays, kept on disk so that a text is tokenised once per machine and not once per run and rank."""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import filelock
import numpy as np
import pyarrow as pa
import transformers
from transformers import PreTrainedTokenizerBase

from adakron.errors import ConfigError
from adakron.log import get_logger

logger = get_logger(__name__)

FORMAT_VERSION = 1
"""Part of every cache key: raise it when what is stored changes its meaning."""

_ROWS_AT_ONCE = 10_000  # bounds the memory for Python lists of tokens
_LOCK_SECONDS = 600.0  # a rank that waited this long for another one's tokenisation does its own
_OFFSETS, _TRUNCATED, _ROWS = "offsets", "truncated", "rows"


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a split, flat: example i is `features[name][offsets[i]:offsets[i + 1]]`.

    features: "input_ids", and "token_type_ids" where the tokenizer makes them; int32. offsets: (examples + 1,) int64.
    truncated: how many examples had more than the maximum of tokens.
    rows: (examples,) int64, the row of the data set that each example was made of, or None where row i made example i.
    """

    features: Mapping[str, np.ndarray]
    offsets: np.ndarray
    truncated: int
    rows: np.ndarray | None = None


def usable_length(max_seq_length: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input in tokens that the settings and the tokenizer's model allow."""
    return min(max_seq_length, int(tokenizer.model_max_length))


def encode_texts(
    dataset: datasets.Dataset,
    text_columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    cache_dir: Path | None = None,
) -> TokenTable:
    """Tokenise one text column, or two as pairs, with the tokenizer's special tokens and no padding.

    Longer inputs than max_seq_length tokens (or the tokenizer's own limit, where that is lower) are cut, of a pair the
    longer text first. The result is kept in cache_dir (default: the folder `adakron` in the cache of the datasets library)
    under a key made of the texts, the tokenizer and the length; a folder that cannot be written to means no cache.

    Raises ConfigError where max_seq_length leaves no room for a token of each text.
    """
    limit = usable_length(max_seq_length, tokenizer)
    least = tokenizer.num_special_tokens_to_add(pair=len(text_columns) == 2) + len(text_columns)
    if limit < least:
        raise ConfigError(
            f"max_seq_length is {max_seq_length}; this tokenizer's special tokens and one token per text need {least} "
            f"(set --max_seq_length {least} or more)"
        )
    path = cache_path(dataset, text_columns, tokenizer, limit, cache_dir)
    return cached(path, len(dataset), lambda: _tokenise(dataset, text_columns, tokenizer, limit))


def encode_pieces(dataset: datasets.Dataset, column: str, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None = None) -> TokenTable:
    """The tokens of one text column, uncut and without special tokens: pieces that a task puts together. Kept as `encode_texts` does."""
    # None: without special tokens.
    path = cache_path(dataset, [column], tokenizer, None, cache_dir)
    return cached(path, len(dataset), lambda: _tokenise_pieces(dataset, column, tokenizer))


def cache_path(
    dataset: datasets.Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, settings: Any, cache_dir: Path | None = None
) -> Path:
    """The cache file of what a tokenizer makes of these columns. settings: all else that it depends on, as JSON takes it."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "adakron" if cache_dir is None else cache_dir
    return folder / f"{_cache_key(dataset, columns, tokenizer, settings)}.npz"


def _tokenise_pieces(dataset: datasets.Dataset, column: str, tokenizer: PreTrainedTokenizerBase) -> TokenTable:
    parts, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        texts = dataset[start : start + _ROWS_AT_ONCE][column]
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        lengths.append(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        parts += [np.asarray(row, dtype=np.int32) for row in rows]
    offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
    return TokenTable(features={"input_ids": np.concatenate(parts)}, offsets=offsets, truncated=0)


def cached(path: Path, rows: int, build: Callable[[], TokenTable]) -> TokenTable:
    """The table that a cache file holds, or build's, which is then kept there. rows: of the data set."""
    found = _read(path, rows)
    if found is not None:
        return found
    with _lock(path):
        # Another process may have tokenised while this one waited for the lock.
        found = _read(path, rows)
        if found is None:
            found = build()
            _write(path, found)
    return found


def _tokenise(dataset: datasets.Dataset, text_columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> TokenTable:
    parts: dict[str, list[np.ndarray]] = {}
    lengths = []
    truncated = 0
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        rows = dataset[start : start + _ROWS_AT_ONCE]
        texts = [rows[column] for column in text_columns]
        encoded = tokenizer(*texts, truncation="longest_first", max_length=limit, padding=False, return_attention_mask=False, verbose=False)
        batch_lengths = np.fromiter(map(len, encoded["input_ids"]), dtype=np.int64, count=len(texts[0]))
        full = np.flatnonzero(batch_lengths >= limit)
        truncated += _count_longer([[column[i] for i in full] for column in texts], tokenizer, limit)
        lengths.append(batch_lengths)
        for name in ("input_ids", "token_type_ids"):
            if name in encoded:
                flat = (token for row in encoded[name] for token in row)
                parts.setdefault(name, []).append(np.fromiter(flat, dtype=np.int32, count=int(batch_lengths.sum())))
    features = {name: np.concatenate(arrays) for name, arrays in parts.items()} or {"input_ids": np.zeros(0, np.int32)}
    all_lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    return _without_empty_rows(features, all_lengths, tokenizer, truncated)


def _count_longer(texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, limit: int) -> int:
    # Only inputs that fill the limit can have been cut; these few are tokenised again, whole, for an exact count.
    if not texts[0]:
        return 0
    whole = tokenizer(*texts, truncation=False, padding=False, return_attention_mask=False, verbose=False)
    return sum(len(row) > limit for row in whole["input_ids"])


def _without_empty_rows(
    features: dict[str, np.ndarray], lengths: np.ndarray, tokenizer: PreTrainedTokenizerBase, truncated: int
) -> TokenTable:
    # A tokenizer without special tokens (GPT-2) makes nothing of an empty text, and attention over no token is undefined.
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, 0)
        filler = next(token for token in ids if token is not None)
        places = np.concatenate(([0], np.cumsum(lengths)))[empty]
        features = {name: np.insert(array, places, filler if name == "input_ids" else 0) for name, array in features.items()}
        lengths = np.maximum(lengths, 1)
    return TokenTable(features=features, offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64), truncated=truncated)


def _cache_key(dataset: datasets.Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, settings: Any) -> str:
    digest = hashlib.sha256()
    code = [FORMAT_VERSION, transformers.__version__, type(tokenizer).__name__, tokenizer.model_input_names]
    digest.update(json.dumps([*code, list(columns), settings]).encode())
    digest.update(_tokenizer_state(tokenizer))
    table = dataset.select_columns(list(columns)).with_format("arrow")[:].combine_chunks().replace_schema_metadata(None)
    with pa.PythonFile(_HashingFile(digest), mode="w") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return digest.hexdigest()


class _HashingFile:
    """A file that keeps nothing but the digest of what is written to it."""

    closed = False

    def __init__(self, digest: "hashlib._Hash"):
        self._digest = digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Left behind by the last call, not a property of the tokenizer.
        state.pop("truncation", None)
        state.pop("padding", None)
        return json.dumps(state, sort_keys=True).encode()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)


def _read(path: Path, rows: int) -> TokenTable | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
        offsets, truncated = loaded.pop(_OFFSETS), int(loaded.pop(_TRUNCATED))
        origin = loaded.pop(_ROWS, None)
        examples = rows if origin is None else len(origin)
        if len(offsets) != examples + 1 or any(len(array) != offsets[-1] for array in loaded.values()) or "input_ids" not in loaded:
            raise ValueError("its arrays do not fit together")
        if origin is not None and not np.array_equal(np.unique(origin), np.arange(rows)):
            raise ValueError("its examples are not those of the rows")
        return TokenTable(features=loaded, offsets=offsets, truncated=truncated, rows=origin)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("the tokenised data in %s cannot be read (%s); tokenising again", path, error)
        return None


def _write(path: Path, table: TokenTable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                origin = {} if table.rows is None else {_ROWS: table.rows}
                counts = {_OFFSETS: table.offsets, _TRUNCATED: np.int64(table.truncated), **origin}
                np.savez(file, **counts, **table.features)  # type: ignore[arg-type]
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        logger.info("tokenised data is not cached: %s", error)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the machine-wide lock of a cache file; go without where locks are unsupported, refused, or held for too long."""
    lock = filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # filelock.Timeout is an OSError
        logger.debug("tokenising without a lock: %s", error)
    try:
        yield
    finally:
        lock.release()
