"""What tasks do alike with raw splits and encoded examples, so that each says only what is its own."""

from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np

from adakron.config import DataConfig
from adakron.data.collation import pad_batch
from adakron.errors import DataError
from adakron.tasks.base import Batch, EncodedSplit
from adakron.tasks.sources import RawSplit


def check_all(raw: Mapping[str, RawSplit], check: Callable[[str, RawSplit], datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Every split as `check` returns it from its name and rows. Raises one DataError with those that it raised for any of them."""
    checked, problems = {}, []
    for name, split in raw.items():
        try:
            checked[name] = check(name, split)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return checked


def find_split(task: str, splits: Mapping[str, datasets.Dataset], name: str) -> datasets.Dataset:
    """A split that must exist; DataError else. task: its name."""
    if name not in splits:
        raise DataError(
            f"task {task} has no {name} split, only {', '.join(splits) or 'none'}; name its file with --train_file, --validation_file or"
            " --test_file, or add it to --data_dir"
        )
    return splits[name]


def most_examples(data: DataConfig, split: str) -> int | None:
    """How many of a split's first examples the settings ask for; None: all."""
    if split == "train":
        return data.max_train_samples
    return data.max_eval_samples if split.startswith("validation") else data.max_predict_samples


def first_rows(rows: datasets.Dataset, data: DataConfig, split: str) -> datasets.Dataset:
    """The rows that `most_examples` leaves."""
    limit = most_examples(data, split)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def pad_examples(encoded: EncodedSplit, indices: Sequence[int] | np.ndarray, pad_token_id: int, data: DataConfig) -> Batch:
    """`pad_batch`, as far as the settings and the split say."""
    return pad_batch(encoded, indices, pad_token_id=pad_token_id, pad_to_multiple_of=data.pad_to_multiple_of, max_length=encoded.max_length)
