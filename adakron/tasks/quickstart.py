"""The default task: sentiment of short reviews that the project writes itself, so that a first run needs no download."""

from collections.abc import Mapping

import datasets

from adakron.tasks.classification import TextClassificationTask, TextSpec
from adakron.tasks.labels import LabelRule
from adakron.tasks.reviews import write_reviews
from adakron.tasks.sources import RawSplit, load_raw_splits

DATA_SEED = 1
"""The reviews are one fixed data set: `--seed` changes the training, not the data."""

TRAIN_SIZE, VALIDATION_SIZE, TEST_SIZE = 4000, 500, 500
_COLUMN = "sentence"


class QuickstartTask(TextClassificationTask):
    """4,000 training, 500 validation and 500 test reviews, half of them positive; no text occurs twice.

    A --test_file with a column `sentence` replaces the test reviews.
    """

    def _load(self) -> dict[str, RawSplit]:
        sizes = (VALIDATION_SIZE, TEST_SIZE)
        written = dict(zip(("train", "validation", "test"), write_reviews(DATA_SEED, TRAIN_SIZE, sizes), strict=True))
        splits = {
            split: RawSplit(
                datasets.Dataset.from_dict({_COLUMN: [text for text, _ in reviews], "label": [label for _, label in reviews]}),
                f"{split} split (quickstart)",
            )
            for split, reviews in written.items()
        }
        return splits | (load_raw_splits(self._data, ("test",)) if self._data.test_file else {})

    def _describe(self, raw: Mapping[str, RawSplit]) -> TextSpec:
        return self.spec

    @property
    def spec(self) -> TextSpec:
        """The task's description; needs no data."""
        return TextSpec(
            text_columns=(_COLUMN,),
            label=LabelRule(problem="classification", column="label", names=("negative", "positive")),
            scoring="classification",
            metric_names=("accuracy", "f1_macro"),
            metric_for_best="accuracy",
        )
