"""A text generated from a source: E2E, WebNLG 2017, DART, and own pairs.

The forms of the sources are those of the published runs (AdaKron's NLG/, which takes them from the LoRA repository's
examples/NLG/src/format_converting_{webnlg,dart}.py), built from the data sets' own fields.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from adakron.data.encoding import encode_pieces, usable_length
from adakron.errors import DataError
from adakron.log import get_logger
from adakron.tasks.base import EncodedSplit
from adakron.tasks.causal.base import CausalTask
from adakron.tasks.causal.prompts import Prompts, prompts_of
from adakron.tasks.causal.sequences import join_pairs, marks_of
from adakron.tasks.labels import missing_column, shown
from adakron.tasks.sources import RawSplit, load_raw_splits
from adakron.tasks.splits import check_all, most_examples

logger = get_logger(__name__)

SPLITS = ("train", "validation", "test")
_SOURCE, _TARGET, _CATEGORY = "source", "target", "category"


@dataclass(frozen=True)
class Entry:
    """A row of the data: a source, its references in order (none where the row has no targets), and its part of the split."""

    source: str
    references: tuple[str, ...]
    category: str | None = None


class PairTask(CausalTask):
    """Examples are (source, target): one for every reference of every row, in the data's order.

    The model reads the source's tokens and the end-of-sequence token, then a space and the target, then the end again; its targets are
    all that follows the first end. max_train_samples keeps the first examples, the other limits the first distinct sources with all
    their references: a source without some of them would have other scores.
    """

    other_columns = ""
    """What to do where a column is missing, besides renaming one."""
    _loaded: dict[str, datasets.Dataset] | None = None

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that the rows must have."""

    @abstractmethod
    def entry(self, row: Mapping[str, Any]) -> Entry:
        """What a row of the data holds; ValueError, naming column and value, where it does not fit."""

    def splits(self) -> Mapping[str, datasets.Dataset]:
        """Columns source and target (all texts), and category where the data has parts; without target where there are none.

        Raises DataError with what is wrong in each split.
        """
        if self._loaded is None:
            self._loaded = check_all(load_raw_splits(self._data, SPLITS), self._checked)
        return self._loaded

    def _checked(self, name: str, raw: RawSplit) -> datasets.Dataset:
        columns = self.columns()
        for column in columns:
            if column not in raw.dataset.column_names:
                raise DataError(missing_column(raw, column, self.other_columns))
        entries = list(self._entries(raw, columns))
        with_targets = [entry for entry in entries if entry.references]
        if with_targets and len(with_targets) < len(entries):
            logger.info(
                "%s: %d of %d rows have no usable text and are left out", raw.source, len(entries) - len(with_targets), len(entries)
            )
        if not with_targets and name != "test":
            raise DataError(f"{raw.source} has no texts to learn or to score; every row needs one ({', '.join(columns)})")
        rows: list[tuple[str, str | None, str | None]] = [(e.source, text, e.category) for e in with_targets for text in e.references]
        rows = rows or [(entry.source, None, None) for entry in entries]
        limit = most_examples(self._data, name)
        if name == "train":
            rows = rows[:limit]
        elif limit is not None:
            kept = set(list(dict.fromkeys(source for source, _, _ in rows))[:limit])
            rows = [row for row in rows if row[0] in kept]
        sources, targets, categories = map(list, zip(*rows, strict=True))
        made: dict[str, list[Any]] = {_SOURCE: sources}
        made |= {key: values for key, values in ((_TARGET, targets), (_CATEGORY, categories)) if values[0] is not None}
        return datasets.Dataset.from_dict(made)

    def _entries(self, raw: RawSplit, columns: Sequence[str]) -> Iterator[Entry]:
        for number, row in enumerate(raw.dataset.select_columns(list(columns))):
            try:
                yield self.entry(row)
            except ValueError as error:
                raise DataError(f"{raw.source}, row {number}: {error}") from None

    def texts(self, split: str) -> Iterator[str]:
        """Sources, then targets."""
        rows = self.split(split)
        yield from rows[_SOURCE]
        yield from (f" {text}" for text in rows[_TARGET])

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        """The tokenised split: labels (examples,) int64, where an example's targets begin. DataError where it has no targets."""
        rows = self.split(split)
        if _TARGET not in rows.column_names:
            raise DataError(f"the {split} split of {self.name} has no targets, so it has no loss; generate them (launch/generate.py)")
        spaced = datasets.Dataset.from_dict({_TARGET: [f" {text}" for text in rows[_TARGET]]})
        limit = usable_length(self._data.max_seq_length, tokenizer)
        return join_pairs(encode_pieces(rows, _SOURCE, tokenizer), encode_pieces(spaced, _TARGET, tokenizer), marks_of(tokenizer), limit)

    def prompts(self, split: str, tokenizer: PreTrainedTokenizerBase) -> Prompts:
        """One prompt per distinct source of the split, in order of first appearance, with all its references."""
        rows = self.split(split)
        grouped: dict[str, list[str]] = {}
        categories: dict[str, str] = {}
        no_target = [None] * len(rows)
        for source, target, category in zip(
            rows[_SOURCE],
            rows[_TARGET] if _TARGET in rows.column_names else no_target,
            rows[_CATEGORY] if _CATEGORY in rows.column_names else no_target,
            strict=True,
        ):
            grouped.setdefault(source, []).extend([] if target is None else [target])
            categories.setdefault(source, category)
        sources = list(grouped)
        parts = [categories[source] for source in sources] if _CATEGORY in rows.column_names else None
        return dataclasses.replace(prompts_of(sources, tokenizer), references=list(grouped.values()), categories=parts)


class E2ETask(PairTask):
    """The E2E challenge (Novikova et al. 2017): `name[X], area[Y]` becomes `name : X | area : Y`; one reference per row."""

    def columns(self) -> tuple[str, ...]:
        """Those of the data set's files (mr and ref there) on the hub."""
        return ("meaning_representation", "human_reference")

    def entry(self, row: Mapping[str, Any]) -> Entry:
        """One meaning representation with one reference."""
        given = _text(row, "meaning_representation")
        # Taken apart step by step: a regular expression for all of it takes minutes where a long white space is.
        *parts, rest = given.split("]")
        slots = [(name.strip().lstrip(", ").strip(), bracket, value.strip()) for name, bracket, value in (p.partition("[") for p in parts)]
        if not slots or rest.strip(", ") or not all(name and "," not in name and bracket for name, bracket, _ in slots):
            raise ValueError(f"meaning_representation is {shown(given)}; it must read like name[X], area[Y]")
        return Entry(" | ".join(f"{name} : {value}" for name, _, value in slots), (_text(row, "human_reference"),))


class WebNLGTask(PairTask):
    """WebNLG 2017 (Gardent et al.): `subject : relation : object | ...`; of a row's texts those whose comment is `good`.

    Prompts have the categories "seen" and "unseen" where the rows say which (seen_category).
    """

    def columns(self) -> tuple[str, ...]:
        """triples [[subject, relation, object]], texts with their comments, and whether the category occurs in training."""
        return ("triples", "texts", "comments", "seen_category")

    def entry(self, row: Mapping[str, Any]) -> Entry:
        """One set of triples with its good texts."""
        texts, comments = _list(row, "texts"), _list(row, "comments")
        if len(texts) != len(comments):
            raise ValueError(f"texts and comments are {len(texts)} and {len(comments)}; every text has a comment")
        good = _usable([text for text, comment in zip(texts, comments, strict=True) if comment == "good"], "texts")
        if not isinstance(row["seen_category"], bool):
            raise ValueError(f"seen_category is {shown(row['seen_category'])}; it must be true or false")
        return Entry(_linearised(row, "triples"), good, "seen" if row["seen_category"] else "unseen")


class DartTask(PairTask):
    """DART (Nan et al. 2021): as WebNLG, with the relations in lower case and every text."""

    def columns(self) -> tuple[str, ...]:
        """tripleset [[subject, relation, object]]; annotations, a list of {source, text} or one with lists of both."""
        return ("tripleset", "annotations")

    def entry(self, row: Mapping[str, Any]) -> Entry:
        """One set of triples with its texts; the test split of the release has one that is empty, which is left out."""
        given = row["annotations"]
        if isinstance(given, Mapping):
            texts = given.get("text")
        elif all(isinstance(one, Mapping) for one in _list(row, "annotations")):
            texts = [one.get("text") for one in given]
        else:
            texts = None
        if not isinstance(texts, list):
            raise ValueError(f'annotations is {shown(given)}; it must be a list of {{"source", "text"}}, or one with lists of both')
        return Entry(_linearised(row, "tripleset", lower=True), _usable(texts, "annotations"))


class OwnPairsTask(PairTask):
    """Own files with a source and a target column; the target may be a list of references. A test file may have no targets."""

    other_columns = "or set --source_column and --target_column"

    def columns(self) -> tuple[str, ...]:
        """As the settings name them."""
        source = self._data.source_column or _SOURCE
        return (source, self._data.target_column or _TARGET)

    def _checked(self, name: str, raw: RawSplit) -> datasets.Dataset:
        target = self.columns()[1]
        if name == "test" and target not in raw.dataset.column_names and self.columns()[0] in raw.dataset.column_names:
            raw = RawSplit(raw.dataset.add_column(target, [[] for _ in raw.dataset]), raw.source)
        return super()._checked(name, raw)

    def entry(self, row: Mapping[str, Any]) -> Entry:
        """One source with one target or a list of them."""
        source, target = self.columns()
        if isinstance(row[target], list):
            return Entry(_text(row, source), tuple(_text({target: text}, target) for text in row[target]))
        return Entry(_text(row, source), (_text(row, target),))


def _linearised(row: Mapping[str, Any], column: str, lower: bool = False) -> str:
    triples = _list(row, column)
    if not triples or any(not isinstance(triple, list) or len(triple) != 3 or None in triple for triple in triples):
        raise ValueError(f"{column} is {shown(triples)}; it must be a list of [subject, relation, object], none of them null")
    return " | ".join(f"{subject} : {str(relation).lower() if lower else relation} : {value}" for subject, relation, value in triples)


def _usable(texts: Sequence[Any], column: str) -> tuple[str, ...]:
    """The texts that say something; a null is as good as an empty one."""
    wrong = [text for text in texts if text is not None and not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{column} holds {shown(wrong[0])}; every one must be a text")
    return tuple(text.strip() for text in texts if text and text.strip())


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    if not isinstance(row[column], list):
        raise ValueError(f"{column} is {shown(row[column])}; it must be a list")
    return list(row[column])


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} is {shown(value)}; it must be a text that is not empty")
    return value.strip()


PAIR_TASKS: Mapping[str, type[PairTask]] = {"e2e_nlg": E2ETask, "webnlg_2017": WebNLGTask, "dart": DartTask, "pairs": OwnPairsTask}
