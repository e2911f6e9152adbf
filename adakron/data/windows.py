"""Questions with contexts longer than a model reads: overlapping windows of the context, each behind its question."""

from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from adakron.data.encoding import TokenTable, cache_path, cached, usable_length
from adakron.data.offsets import check_offsets, trimmed, with_marks
from adakron.errors import ConfigError

CONTEXT, NULL = 1, 2
"""Roles of tokens: part of the context; the one that stands for "no answer". All others have the role 0."""

_FORMAT = "windows 2"
"""Part of the cache key: raise it when what is stored changes its meaning."""

_ROWS_AT_ONCE = 1000  # bounds the memory for Python lists of tokens


def encode_windows(
    dataset: datasets.Dataset,
    question_column: str,
    context_column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    stride: int,
    cache_dir: Path | None = None,
) -> TokenTable:
    """Tokenise questions with their contexts, a context in as many windows as it needs; kept on disk as `encode_texts` does.

    stride: tokens of context that a window has in common with the one before. The table's `rows` are the questions' rows. Features
    beside the model's inputs, per token: "roles" (see CONTEXT), and "char_starts" and "char_ends", the token's characters
    [start, end) in the context, -1 outside of it. White space before a question is dropped, and a question that leaves no room for
    the stride is cut; `truncated` counts these.

    Raises ConfigError for a slow tokenizer and where max_seq_length leaves no room beside the stride.
    """
    check_offsets(tokenizer)
    limit = usable_length(max_seq_length, tokenizer)
    # Of a window, the stride and one more token must be left beside the question, of which one token is kept at least.
    room = limit - tokenizer.num_special_tokens_to_add(pair=True) - stride - 1
    if room < 1:
        raise ConfigError(
            f"doc_stride is {stride} and inputs have {limit} tokens; the question, one more token of context and the special tokens need"
            f" {1 - room} more (set --doc_stride lower, or --max_seq_length higher)"
        )
    path = cache_path(dataset, [question_column, context_column], tokenizer, [_FORMAT, limit, stride], cache_dir)
    return cached(path, len(dataset), lambda: _tokenise(dataset, question_column, context_column, tokenizer, limit, stride, room))


def _tokenise(
    dataset: datasets.Dataset,
    question_column: str,
    context_column: str,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    stride: int,
    room: int,
) -> TokenTable:
    parts: dict[str, list[np.ndarray]] = {}
    rows_of: list[int] = []
    truncated = 0
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        rows = dataset[start : start + _ROWS_AT_ONCE]
        given = [question.lstrip() for question in rows[question_column]]
        questions = [_cut(question, tokenizer, room) for question in given]
        truncated += sum(cut != whole for cut, whole in zip(questions, given, strict=True))
        contexts = rows[context_column]
        encoded = tokenizer(
            questions, contexts, truncation="only_second", max_length=limit, stride=stride, return_overflowing_tokens=True,
            return_offsets_mapping=True, return_attention_mask=False, padding=False, verbose=False,
        )  # fmt: skip
        origin = encoded["overflow_to_sample_mapping"]
        rows_of += [start + row for row in origin]
        for window, row in enumerate(origin):
            tokens = {name: np.asarray(encoded[name][window], np.int32) for name in ("input_ids", "token_type_ids") if name in encoded}
            tokens |= _places(
                contexts[row], tokens["input_ids"], encoded.sequence_ids(window), encoded["offset_mapping"][window], tokenizer.cls_token_id
            )
            for name, values in tokens.items():
                parts.setdefault(name, []).append(values)
    lengths = [len(values) for values in parts.get("input_ids", [])]
    return TokenTable(
        features={name: np.concatenate(arrays) for name, arrays in parts.items()} or {"input_ids": np.zeros(0, np.int32)},
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        truncated=truncated,
        rows=np.asarray(rows_of, dtype=np.int64),
    )


def _places(
    context: str, ids: np.ndarray, sequences: list[int | None], offsets: list[tuple[int, int]], null_token: int | None
) -> dict[str, np.ndarray]:
    """Roles and characters of a window's tokens."""
    roles = np.zeros(len(ids), np.int32)
    spans = np.full((2, len(ids)), -1, dtype=np.int32)
    if 1 in sequences:
        first = sequences.index(1)
        own = slice(first, first + sequences.count(1))
        roles[own] = CONTEXT
        places = np.asarray(offsets[own], dtype=np.int64)
        starts, ends = trimmed(context, places[:, 0], places[:, 1])
        spans[0, own], spans[1, own] = starts, with_marks(context, starts, ends)
    # A tokenizer without such a token (GPT-2's) lets the first one stand for no answer.
    found = np.flatnonzero(ids == null_token) if null_token is not None else np.zeros(0, np.int64)
    roles[found[:1] if len(found) else 0] = NULL
    return {"roles": roles, "char_starts": spans[0], "char_ends": spans[1]}


def _cut(question: str, tokenizer: PreTrainedTokenizerBase, room: int) -> str:
    """The beginning of a question that has at most so many tokens."""
    keep = room
    # A token stands for a byte at least, but for a mark that some tokenizers put in front.
    while len(question.encode(errors="replace")) + 1 > room:
        offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(offsets) <= room:
            break
        # What is left may be cut into other tokens than before, even more of them: then it loses one more.
        question = question[: min(offsets[keep - 1][1], len(question) - 1)]
        keep = max(1, keep - 1)
    return question
