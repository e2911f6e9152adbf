"""Token sequences of the causal tasks: a source with its target, windows of a long text. The inverse of neither is needed."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from adakron.data.encoding import TokenTable
from adakron.errors import ConfigError
from adakron.tasks.base import EncodedSplit


@dataclass(frozen=True)
class Marks:
    """start: tokens that the tokenizer puts before every text (Llama's <s>; none of GPT-2's). end: ends a source and a target."""

    start: tuple[int, ...]
    end: int


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """ConfigError where the tokenizer has no end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token, which ends sources and targets (name its eos_token in"
            " tokenizer_config.json, or set --tokenizer_name)"
        )
    adds_start = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return Marks((int(tokenizer.bos_token_id),) if adds_start else (), int(tokenizer.eos_token_id))


def join_pairs(sources: TokenTable, targets: TokenTable, marks: Marks, limit: int) -> EncodedSplit:
    """start + source + end + target + end for each pair; the targets are what follows the first end.

    Longer ones than `limit` tokens are cut: the target at its end, as in the published code, which cuts whole sequences; and where
    less than half of the limit would remain for the target, the source at its beginning.
    """
    before = len(marks.start)
    if limit < before + 4:
        raise ConfigError(f"max_seq_length leaves {limit} tokens; a source and a target need {before + 4} (set --max_seq_length)")
    source, target = np.diff(sources.offsets), np.diff(targets.offsets) + 1  # with its end
    kept_target = np.minimum(target, np.maximum(limit - before - 1 - source, limit // 2))
    kept_source = np.minimum(source, limit - before - 1 - kept_target)
    first = before + kept_source + 1
    offsets = np.concatenate(([0], np.cumsum(first + kept_target))).astype(np.int64)
    tokens = np.full(offsets[-1], marks.end, dtype=np.int32)
    starts = offsets[:-1]
    for place, token in enumerate(marks.start):
        tokens[starts + place] = token
    _copy(tokens, starts + before, sources, source - kept_source, kept_source)
    _copy(tokens, starts + first, targets, np.zeros_like(target), np.minimum(kept_target, target - 1))
    return EncodedSplit(
        features={"input_ids": tokens},
        offsets=offsets,
        labels=first,
        target_counts=kept_target,
        truncated=int(((kept_source < source) | (kept_target < target)).sum()),
        max_length=limit,
    )


def join_prompts(sources: TokenTable, marks: Marks) -> tuple[np.ndarray, np.ndarray]:
    """start + source + end for each source, flat, and the offsets; uncut, for only the decoder knows how much it will write."""
    before, lengths = len(marks.start), np.diff(sources.offsets)
    offsets = np.concatenate(([0], np.cumsum(before + lengths + 1))).astype(np.int64)
    tokens = np.full(offsets[-1], marks.end, dtype=np.int32)
    for place, token in enumerate(marks.start):
        tokens[offsets[:-1] + place] = token
    _copy(tokens, offsets[:-1] + before, sources, np.zeros_like(lengths), lengths)
    return tokens, offsets


def cut_windows(documents: TokenTable, start_token: int, length: int, stride: int) -> EncodedSplit:
    """Windows of up to `length` tokens over each document, preceded by a start token; every token of a document is a target once.

    A window begins `stride` tokens behind the one before it and predicts what that did not reach; the rest of it is context. So a
    token that is not among the first `length` of its document is predicted from length - stride tokens or more. No window reaches
    into another document. 1 <= stride < length.
    """
    begins, ends, firsts = [], [], []
    starts = documents.offsets[:-1] + np.arange(len(documents.offsets) - 1)  # each document is one token longer here
    sizes = np.diff(documents.offsets) + 1
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        begin = np.arange(0, max(1, size - length + stride), stride)
        end = np.minimum(begin + length, size)
        reached = np.concatenate(([1], end[:-1]))
        used = end > reached
        begins.append(start + begin[used])
        ends.append(start + end[used])
        firsts.append((reached - begin)[used])
    begin, end, first = np.concatenate(begins), np.concatenate(ends), np.concatenate(firsts)
    tokens = np.insert(documents.features["input_ids"], documents.offsets[:-1], start_token)
    lengths = end - begin
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return EncodedSplit(
        features={"input_ids": tokens[np.repeat(begin, lengths) + inside]},
        offsets=offsets,
        labels=first,
        target_counts=lengths - first,
        truncated=0,
        max_length=length,
    )


def first_examples(encoded: EncodedSplit, count: int | None) -> EncodedSplit:
    """The split's first examples; all of them where count is None."""
    if count is None or count >= len(encoded):
        return encoded
    end = encoded.offsets[count]
    return EncodedSplit(
        features={name: values[:end] for name, values in encoded.features.items()},
        offsets=encoded.offsets[: count + 1],
        labels=None if encoded.labels is None else encoded.labels[:count],
        target_counts=encoded.target_counts[:count],
        truncated=encoded.truncated,
        max_length=encoded.max_length,
    )


def _copy(tokens: np.ndarray, places: np.ndarray, table: TokenTable, skipped: np.ndarray, lengths: np.ndarray) -> None:
    """Put of every row of the table `lengths` tokens, behind the first `skipped`, at `places` of the flat tokens."""
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found = table.features["input_ids"][np.repeat(table.offsets[:-1] + skipped, lengths) + inside]
    tokens[np.repeat(places, lengths) + inside] = found
