"""One label per text or pair of texts: the shared body of the GLUE tasks, own data and the quickstart task."""

import csv
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adakron.config import DataConfig, TrainingConfig
from adakron.data.encoding import encode_texts, usable_length
from adakron.errors import DataError
from adakron.objectives import OutputKind
from adakron.tasks.base import Batch, EncodedSplit, Forward
from adakron.tasks.labels import LabelRule, check_split, label_name
from adakron.tasks.scoring import TextScore
from adakron.tasks.sources import RawSplit
from adakron.tasks.splits import find_split, first_rows, pad_examples

SPLITS = ("train", "validation", "validation_mismatched", "test", "test_mismatched")


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What distinguishes one text task from another.

    text_columns: one, or two for pairs. label: what a label may be. scoring: configuration of `TextScore`.
    metric_names: what that returns. metric_for_best: which of them decides.
    """

    text_columns: tuple[str, ...]
    label: LabelRule
    scoring: str
    metric_names: tuple[str, ...]
    metric_for_best: str


class TextClassificationTask:
    """A task with one class index or one number per example; subclasses say where rows come from and what a label may be.

    The loss is cross-entropy with torch's label smoothing, or the squared error for regression. Data is read when it is
    first needed and checked as a whole then; the max_*_samples settings keep the first rows of the checked splits.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, data: DataConfig, training: TrainingConfig):
        self.name = data.task_name
        self._data = data
        self._label_smoothing = training.label_smoothing
        self._loaded: tuple[TextSpec, dict[str, datasets.Dataset]] | None = None

    @abstractmethod
    def _load(self) -> dict[str, RawSplit]:
        """The raw splits that exist."""

    @abstractmethod
    def _describe(self, raw: Mapping[str, RawSplit]) -> TextSpec:
        """What the task is; may depend on its data. Raises DataError."""

    @property
    def metric_for_best(self) -> str:
        """The metric that decides what is best."""
        return self.spec.metric_for_best

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of `score`, besides "loss"."""
        return self.spec.metric_names

    @property
    def spec(self) -> TextSpec:
        """The task's description. Reads the data where it depends on it."""
        return self._checked()[0]

    @property
    def output_kind(self) -> OutputKind:
        """Logits over the classes, or the value of a regression."""
        return "values" if self.spec.label.problem == "regression" else "logits"

    def model_options(self) -> dict[str, Any]:
        """num_labels, id2label, label2id and problem_type for the model's configuration."""
        label = self.spec.label
        if label.problem == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(label.names),
            "id2label": dict(enumerate(label.names)),
            "label2id": {name: index for index, name in enumerate(label.names)},
            "problem_type": "single_label_classification",
        }

    def splits(self) -> Mapping[str, datasets.Dataset]:
        """The checked splits: the text columns, and `label` (class index or number; `label_name`) where labelled.

        Raises DataError with everything that is wrong in any of them.
        """
        return self._checked()[1]

    def _checked(self) -> tuple[TextSpec, dict[str, datasets.Dataset]]:
        if self._loaded is None:
            raw = self._load()
            spec = self._describe(raw)
            checked: dict[str, datasets.Dataset] = {}
            problems = []
            for split in (split for split in SPLITS if split in raw):
                dataset, found = check_split(split, raw[split], spec.text_columns, spec.label)
                problems += found
                if dataset is not None:
                    checked[split] = first_rows(dataset, self._data, split)
            if problems:
                raise DataError("\n".join(problems))
            self._loaded = spec, checked
        return self._loaded

    def _split(self, split: str) -> datasets.Dataset:
        return find_split(self.name, self.splits(), split)

    def _labels(self, split: str) -> np.ndarray | None:
        dataset = self._split(split)
        name = label_name(self.spec.text_columns)
        if name not in dataset.column_names:
            return None
        kind = np.float32 if self.spec.label.problem == "regression" else np.int64
        return np.asarray(dataset.with_format("numpy")[name][:], dtype=kind)

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        """The tokenised split: labels int64 (examples,), or float32 for regression; None where unlabelled."""
        return self._encoded(self._split(split), self._labels(split), tokenizer)

    def _encoded(self, rows: datasets.Dataset, labels: np.ndarray | None, tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        tokens = encode_texts(rows, self.spec.text_columns, tokenizer, self._data.max_seq_length)
        return EncodedSplit(
            features=tokens.features,
            offsets=tokens.offsets,
            labels=labels,
            target_counts=np.ones(len(rows), dtype=np.int64),
            truncated=tokens.truncated,
            max_length=usable_length(self._data.max_seq_length, tokenizer),
        )

    def encode_texts(self, columns: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        """Unlabelled texts as `encode` would read them from a file; one sequence per text column of the task.

        Raises DataError where the number of columns or of texts does not fit.
        """
        names = self.spec.text_columns
        if len(columns) != len(names) or len({len(texts) for texts in columns}) != 1:
            raise DataError(
                f"task {self.name} reads {' and '.join(names)}, got {' and '.join(str(len(texts)) for texts in columns)} texts for "
                f"{len(columns)} of them; give --text once per example{' and --text_pair with each' if len(names) == 2 else ''}"
            )
        rows = datasets.Dataset.from_dict(dict(zip(names, map(list, columns), strict=True)))
        return self._encoded(rows, None, tokenizer)

    def describe(self, outputs: np.ndarray) -> list[str]:
        """One prediction per example: the class name with its probability, or the number."""
        if self.spec.label.problem == "regression":
            return [f"{value:.4f}" for value in outputs[:, 0]]
        probabilities = torch.from_numpy(outputs).softmax(-1).numpy()
        return [f"{self.spec.label.names[row.argmax()]} ({row.max():.3f})" for row in probabilities]

    def collate(self, encoded: EncodedSplit, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
        """input_ids, attention_mask and, from some tokenizers, token_type_ids (B, T) int64; labels (B,) where there are any."""
        batch = pad_examples(encoded, indices, pad_token_id, self._data)
        if encoded.labels is not None:
            batch["labels"] = torch.from_numpy(encoded.labels[np.asarray(indices, dtype=np.int64)])
        return batch

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum over the batch of cross-entropy in nats, or of squared errors, fp32 scalar; the logits (B, C))."""
        logits = self.predict(forward, batch)
        return self._loss_sum(logits, batch["labels"], self._label_smoothing), logits

    def predict(self, forward: Forward, batch: Batch) -> Tensor:
        """Logits (B, C) in fp32; C is 1 for regression."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = forward(**inputs).logits.float()
        return logits

    def _loss_sum(self, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        if self.spec.label.problem == "regression":
            return F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)

    def score(self, split: str, outputs: np.ndarray) -> dict[str, float]:
        """The metrics of a labelled split and "loss", the mean without label smoothing. Raises DataError where unlabelled."""
        labels = self._labels(split)
        if labels is None:
            raise DataError(f"the {split} split of {self.name} has no labels, so it has no score; predict it instead (--do_predict)")
        assert len(outputs) == len(labels), f"{len(outputs)} outputs for {len(labels)} examples of {split}"
        metric = TextScore(self.spec.scoring)
        result: dict[str, float] = metric.compute(predictions=self._predictions(outputs), references=labels)
        loss = self._loss_sum(torch.from_numpy(outputs).double(), torch.from_numpy(labels).to(_double_or_index(labels)), 0.0)
        return {**result, "loss": float(loss) / len(labels)}

    def _predictions(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, 0] if self.spec.label.problem == "regression" else outputs.argmax(axis=-1)

    def prediction_files(self, split: str) -> tuple[str, ...]:
        """predict_results_<split>.tsv"""
        return (f"predict_results_{split}.tsv",)

    def write_predictions(self, split: str, outputs: np.ndarray, folder: Path) -> None:
        """Write a TSV file with the header "index, prediction": class names, or numbers with four decimals."""
        assert len(outputs) == len(self._split(split)), f"{len(outputs)} outputs for {len(self._split(split))} examples of {split}"
        names = self.spec.label.names
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self.prediction_files(split)[0]).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(("index", "prediction"))
            for index, prediction in enumerate(self._predictions(outputs)):
                writer.writerow((index, names[prediction] if names else f"{prediction:.4f}"))


def _double_or_index(labels: np.ndarray) -> torch.dtype:
    return torch.float64 if labels.dtype.kind == "f" else torch.int64
