"""Named entities in own texts, one tag per word: a whole task in one file, the worked example of docs/tasks.md.

Rows hold `tokens` (the words) and `tags` (O, B-TYPE, I-TYPE: IOB2, Ramshaw and Marcus 1995); or files end in .conll: a word and, in
the last column, its tag on each line, an empty line between sentences. A word's tag is predicted at its first token.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adakron.config import DataConfig, TrainingConfig
from adakron.data.encoding import encode_pieces, usable_length
from adakron.errors import ConfigError, DataError
from adakron.objectives import OutputKind
from adakron.tasks.base import Batch, EncodedSplit, Forward
from adakron.tasks.labels import missing_column, shown
from adakron.tasks.sources import RawSplit, load_raw_splits
from adakron.tasks.splits import check_all, find_split, first_rows, pad_examples

SPLITS = ("train", "validation", "test")
OUTSIDE = "O"
_NO_TARGET = -1  # of padding, special tokens and the tokens of a word behind its first


class NerTask:
    """Token classification; examples are sentences, and every word is one target.

    The classes are the tags of the train split, O first. saved_options: the model options of an earlier run, which decide instead.
    Words beyond max_seq_length have no target in training and are taken for predicted as O in the scores.
    """

    auto_class = "AutoModelForTokenClassification"
    metric_for_best = "f1"
    metric_names: tuple[str, ...] = ("precision", "recall", "f1", "accuracy")
    output_kind: OutputKind = "logits"

    def __init__(self, data: DataConfig, training: TrainingConfig, saved_options: Mapping[str, Any] | None = None):
        self.name = data.task_name
        self._data = data
        self._label_smoothing = training.label_smoothing
        self._saved = saved_options
        self._loaded: dict[str, datasets.Dataset] | None = None
        self._encoded: dict[str, EncodedSplit] = {}

    # --- data -----------------------------------------------------------------------------------------------------------------------

    def splits(self) -> Mapping[str, datasets.Dataset]:
        """Columns tokens and, where the file has them, tags. Raises DataError with everything that is wrong in any split."""
        if self._loaded is None:
            self._loaded = check_all(load_raw_splits(self._data, SPLITS, readers={".conll": read_conll}), self._checked)
        return self._loaded

    def _checked(self, name: str, raw: RawSplit) -> datasets.Dataset:
        rows = raw.dataset
        if "tokens" not in rows.column_names:
            raise DataError(missing_column(raw, "tokens"))
        tagged = "tags" in rows.column_names
        if not tagged and name != "test":
            raise DataError(missing_column(raw, "tags"))
        if tagged and name == "test" and all(tags is None for tags in rows["tags"]):
            tagged = False
        rows = first_rows(rows, self._data, name)
        rows = rows.select_columns(["tokens", "tags"] if tagged else ["tokens"])
        for number, row in enumerate(rows):
            problem = _problem(**row)
            if problem:
                raise DataError(f"{raw.source}, row {number}: {problem}")
        return rows

    def _rows(self, split: str) -> datasets.Dataset:
        return find_split(self.name, self.splits(), split)

    @property
    def tags(self) -> tuple[str, ...]:
        """The classes, in the order of their indices."""
        if self._saved is not None:
            names = {int(index): name for index, name in self._saved["id2label"].items()}  # JSON made the indices strings
            return tuple(names[index] for index in range(len(names)))
        found = {tag for tags in self._rows("train")["tags"] for tag in tags}
        return (OUTSIDE, *sorted(found - {OUTSIDE}))

    def model_options(self) -> dict[str, Any]:
        """num_labels, id2label and label2id for the model's configuration."""
        tags = self.tags
        return {"num_labels": len(tags), "id2label": dict(enumerate(tags)), "label2id": {tag: index for index, tag in enumerate(tags)}}

    # --- what the model reads -------------------------------------------------------------------------------------------------------

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        """The tokenised sentences. Feature `classes`: at a word's first token 2 + its class, 1 where it has no known tag; elsewhere 0.

        labels: (sentences,) the words with a target; None where the file has no tags.
        """
        rows = self._rows(split)
        words = [f" {word}" for sentence in rows["tokens"] for word in sentence]  # as inside a text, for tokenizers that see spaces
        pieces = encode_pieces(datasets.Dataset.from_dict({"word": words}), "word", tokenizer)
        before, after = _special_tokens(tokenizer)
        limit = usable_length(self._data.max_seq_length, tokenizer)
        room = limit - len(before) - len(after)
        if room < 1:
            raise ConfigError(
                f"max_seq_length leaves no token between this tokenizer's special ones; set --max_seq_length {limit - room + 1}"
            )
        index = {tag: place for place, tag in enumerate(self.tags)}
        known = [index.get(tag, -1) for tags in rows["tags"] for tag in tags] if "tags" in rows.column_names else [-1] * len(words)
        lengths, unknown = np.diff(pieces.offsets), tokenizer.unk_token_id
        ids, classes, offsets, targets, cut, word = [], [], [0], [], 0, 0
        for sentence in rows["tokens"]:
            line, marks = [], []
            for _ in sentence:
                tokens = pieces.features["input_ids"][pieces.offsets[word] : pieces.offsets[word + 1]].tolist()
                if not lengths[word]:  # a word of nothing but what the tokenizer drops
                    tokens = [before[0] if unknown is None else unknown]
                line += tokens
                marks += [2 + known[word], *[0] * (len(tokens) - 1)]
                word += 1
            cut += len(line) > room
            ids += [*before, *line[:room], *after]
            classes += [*[0] * len(before), *marks[:room], *[0] * len(after)]
            targets.append(sum(mark > 1 for mark in marks[:room]))
            offsets.append(len(ids))
        self._encoded[split] = EncodedSplit(
            features={"input_ids": np.asarray(ids, np.int32), "classes": np.asarray(classes, np.int32)},
            offsets=np.asarray(offsets, np.int64),
            labels=np.asarray(targets, np.int64) if "tags" in rows.column_names else None,
            target_counts=np.asarray(targets, np.int64),
            truncated=cut,
            max_length=limit,
        )
        return self._encoded[split]

    def collate(self, encoded: EncodedSplit, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
        """input_ids, attention_mask (B, T) int64; labels (B, T): the class, or -1 where there is no target.

        positions (N,): where in the flattened labels the N targets are; found here, for on the device finding them waits for it.
        """
        batch = pad_examples(encoded, indices, pad_token_id, self._data)
        batch["labels"] = (batch.pop("classes") - 2).clamp(min=_NO_TARGET)
        batch["positions"] = (batch["labels"].flatten() != _NO_TARGET).nonzero().squeeze(1)
        return batch

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropy over the tagged words, in nats; their logits (words, C))."""
        logits = self._logits(forward, batch).flatten(0, 1).index_select(0, batch["positions"])
        labels = batch["labels"].flatten().index_select(0, batch["positions"])
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self._label_smoothing), logits

    def predict(self, forward: Forward, batch: Batch) -> Tensor:
        """(B, 1 + max_seq_length) fp32: the sum of the sentence's cross-entropy, then the likeliest class at every token."""
        logits = self._logits(forward, batch)
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=_NO_TARGET, reduction="none").sum(1, keepdim=True)
        likeliest = F.pad(logits.argmax(-1).float(), (0, self._data.max_seq_length - logits.shape[1]))
        return torch.cat([losses, likeliest], dim=1)

    def _logits(self, forward: Forward, batch: Batch) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "positions")}
        logits: Tensor = forward(**inputs).logits.float()
        return logits

    # --- what comes out -------------------------------------------------------------------------------------------------------------

    def score(self, split: str, outputs: np.ndarray) -> dict[str, float]:
        """Entities are right where type, first and last word are (`entities`). precision, recall, f1: over all of the split.

        accuracy: of the words' tags. loss: mean over the tagged words that were read. DataError where the split has no tags.
        """
        rows = self._rows(split)
        if "tags" not in rows.column_names:
            raise DataError(f"the {split} split of {self.name} has no tags, so it has no score; predict it instead (--do_predict)")
        found = right = there = same = words = 0
        for expected, predicted in zip(rows["tags"], self._predicted(split, outputs), strict=True):
            gold, ours = set(entities(expected)), set(entities(predicted))
            found, right, there = found + len(ours), right + len(gold & ours), there + len(gold)
            same, words = same + sum(map(str.__eq__, expected, predicted)), words + len(expected)
        targets = int(self._encoded[split].target_counts.sum())
        return {
            "precision": right / found if found else 0.0,
            "recall": right / there if there else 0.0,
            "f1": 2 * right / (found + there) if found + there else 0.0,
            "accuracy": same / words,
            "loss": float(outputs[:, 0].astype(np.float64).sum()) / max(1, targets),
        }

    def _predicted(self, split: str, outputs: np.ndarray) -> Iterator[list[str]]:
        """The tags of every sentence's words."""
        encoded, tags = self._encoded[split], self.tags
        for number, sentence in enumerate(self._rows(split)["tokens"]):
            marks = encoded.features["classes"][encoded.offsets[number] : encoded.offsets[number + 1]]
            read = [tags[int(outputs[number, 1 + place])] for place in np.flatnonzero(marks)]
            yield [*read, *[OUTSIDE] * (len(sentence) - len(read))]

    def prediction_files(self, split: str) -> tuple[str, ...]:
        """predict_results_<split>.tsv"""
        return (f"predict_results_{split}.tsv",)

    def write_predictions(self, split: str, outputs: np.ndarray, folder: Path) -> None:
        """Write a TSV file with the header "index, prediction": the tags of the sentence's words, separated by spaces."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self.prediction_files(split)[0]).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(("index", "prediction"))
            writer.writerows((index, " ".join(tags)) for index, tags in enumerate(self._predicted(split, outputs)))


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, last word) of every entity, as the CoNLL-2000 scorer reads tags: an I- without its beginning begins one."""
    kind, first = "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, here = tag.partition("-")
        if kind and (prefix != "I" or here != kind):
            yield kind, first, place - 1
            kind = ""
        if not kind and prefix in ("B", "I"):
            kind, first = here, place


def read_conll(path: Path) -> datasets.Dataset:
    """The sentences of a file of columns. Lines -DOCSTART- are passed over. DataError where a line has a word and no tag, or none has."""
    tokens: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]  # of the same shape
    # Neither `splitlines` nor `split()`: words may hold no-break spaces and what else Unicode parts lines and words at.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        columns = line.replace("\t", " ").strip(" \r").split(" ")
        columns = [column for column in columns if column]
        if not columns or columns[0] == "-DOCSTART-":
            tokens.append([])
            tags.append([])
        elif len(columns) < 2:
            raise DataError(
                f"{path}, line {number}: {shown(line)} has one column; every line needs a word and, in the last column, its tag"
                " (sentences without tags: jsonl with tokens alone)"
            )
        else:
            tokens[-1].append(columns[0])
            tags[-1].append(columns[-1])
    if not any(tokens):
        raise DataError(f"{path} holds no words; it must hold at least one sentence")
    return datasets.Dataset.from_dict({"tokens": [row for row in tokens if row], "tags": [row for row in tags if row]})


def _problem(tokens: Any, tags: Any = ()) -> str:
    """What is wrong with a sentence; () for no column of tags."""
    if not isinstance(tokens, list) or not tokens or not all(isinstance(word, str) and word.strip() for word in tokens):
        return f"tokens is {shown(tokens)}; it must be a list of words, none of them empty"
    if tags == ():
        return ""
    if not isinstance(tags, list) or len(tags) != len(tokens):
        return f"tags is {shown(tags)}; it must be a list with one tag for each of the {len(tokens)} tokens"
    wrong = next((tag for tag in tags if tag != OUTSIDE and not (isinstance(tag, str) and tag[:2] in ("B-", "I-") and tag[2:])), None)
    return "" if wrong is None else f"a tag is {shown(wrong)}; it must be {OUTSIDE}, B-TYPE or I-TYPE"


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    alone, whole = (tokenizer(" a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(place for place in range(len(whole)) if whole[place : place + len(alone)] == alone)
    return whole[:start], whole[start + len(alone) :]
