"""The task of extractive question answering (SQuAD 1.1 and 2.0, own questions) for the trainer and the evaluator."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adakron.config import DataConfig, TrainingConfig
from adakron.data.encoding import TokenTable, usable_length
from adakron.data.windows import encode_windows
from adakron.errors import DataError
from adakron.objectives import OutputKind
from adakron.scores import squad
from adakron.tasks.base import Batch, EncodedSplit, Forward
from adakron.tasks.qa.answers import Answer, find_answers
from adakron.tasks.qa.labels import answer_positions
from adakron.tasks.qa.reading import ANSWERS, CONTEXT, ID, QUESTION, STARTS, check_questions, read_nested
from adakron.tasks.qa.spans import WindowScores, window_outputs
from adakron.tasks.sources import RawSplit, load_raw_splits
from adakron.tasks.splits import check_all, find_split, first_rows, pad_examples

QA_TASKS = ("squad_v1", "squad_v2", "qa")
_SPLITS = ("train", "validation", "test")
_HIDDEN = -1e9  # the logit of padding: its probability is 0 in fp32, and unlike -inf it has a log


class QuestionTask:
    """Questions whose answer is a span of their context; with version 2's rules they may have none.

    Examples are windows (`adakron.data.windows`). Each has two targets, the positions of the answer's first and last token; where the
    window does not hold the whole answer both are the null token, as in SQuAD's baselines. The loss is their cross-entropy over the
    window's tokens, padding excepted, in nats per target: the mean of the start's and the end's. Of several answers the first is learnt.
    max_*_samples keep the first questions. Settings and their defaults are those of transformers' run_qa.
    """

    auto_class = "AutoModelForQuestionAnswering"
    output_kind: OutputKind = "logits"
    metric_for_best = "f1"

    def __init__(self, data: DataConfig, training: TrainingConfig):
        self.name = data.task_name
        self._data = data
        self._label_smoothing = training.label_smoothing
        self.unanswerable = data.task_name == "squad_v2" or data.version_2_with_negative
        self.n_best = data.n_best_size or 20
        self._candidates = min(self.n_best, data.max_seq_length)  # no window has more starts than tokens
        self._loaded: dict[str, datasets.Dataset] | None = None
        self._tables: dict[str, TokenTable] = {}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The official names; squad_v2's HasAns_... and NoAns_... come besides where there are such questions."""
        if not self.unanswerable:
            return ("exact_match", "f1")
        return ("exact", "f1", "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh")

    def model_options(self) -> dict[str, Any]:
        """Two outputs per token, whatever the backbone was trained for before."""
        return {"num_labels": 2}

    def splits(self) -> Mapping[str, datasets.Dataset]:
        """The checked splits: columns of `adakron.tasks.qa.reading`. Raises DataError with what is wrong in each of them."""
        if self._loaded is None:
            self._loaded = check_all(load_raw_splits(self._data, _SPLITS, readers={".json": read_nested}), self._checked)
        return self._loaded

    def _checked(self, name: str, raw: RawSplit) -> datasets.Dataset:
        return first_rows(check_questions(name, raw, unanswerable=self.unanswerable), self._data, name)

    def _split(self, name: str) -> datasets.Dataset:
        return find_split(self.name, self.splits(), name)

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        """The windows: labels (windows, 2) int64, first and last token of the answer; None where unlabelled."""
        rows = self._split(split)
        encoded, self._tables[split] = self._encoded(rows, tokenizer)
        return encoded

    def _encoded(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedSplit, TokenTable]:
        stride = max(1, self._data.max_seq_length // 3) if self._data.doc_stride is None else self._data.doc_stride
        table = encode_windows(rows, QUESTION, CONTEXT, tokenizer, self._data.max_seq_length, stride)
        labels = answer_positions(table, rows[ANSWERS][:], rows[STARTS][:]) if ANSWERS in rows.column_names else None
        encoded = EncodedSplit(
            features={name: values for name, values in table.features.items() if not name.startswith("char_")},
            offsets=table.offsets,
            labels=labels,
            target_counts=np.full(len(table.offsets) - 1, 2, dtype=np.int64),
            truncated=table.truncated,
            max_length=usable_length(self._data.max_seq_length, tokenizer),
        )
        return encoded, table

    def collate(self, encoded: EncodedSplit, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
        """The model's inputs (B, T); roles (B, T), see `adakron.data.windows`; positions (B, 2) where labelled."""
        batch = pad_examples(encoded, indices, pad_token_id, self._data)
        if encoded.labels is not None:
            batch["positions"] = torch.from_numpy(encoded.labels[np.asarray(indices, dtype=np.int64)])
        return batch

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropy over the 2 B targets, in nats; the logits over tokens at each target (2 B, T)).

        With label smoothing e a target's loss is (1 - e) times its own plus e times the mean over the window's tokens.
        """
        logits = self._logits(forward, batch).flatten(0, 1)
        losses = _losses(logits, batch["positions"].flatten())
        if self._label_smoothing:
            mask = batch["attention_mask"].repeat_interleave(2, dim=0)
            everywhere = -(logits.log_softmax(-1) * mask).sum(-1) / mask.sum(-1)
            losses = (1.0 - self._label_smoothing) * losses + self._label_smoothing * everywhere
        return losses.sum(), logits

    def predict(self, forward: Forward, batch: Batch) -> Tensor:
        """(B, 4 candidates + 3) fp32, see `window_outputs`: what post-processing needs of a window, however long it is."""
        logits = self._logits(forward, batch)
        losses = logits.new_zeros(len(logits))
        if "positions" in batch:
            losses = _losses(logits.flatten(0, 1), batch["positions"].flatten()).view(-1, 2).sum(-1)
        return window_outputs(logits, batch["roles"], self._candidates, losses)

    def _logits(self, forward: Forward, batch: Batch) -> Tensor:
        """(B, 2, T) fp32, of starts and ends, padding hidden."""
        found = forward(**{name: tensor for name, tensor in batch.items() if name not in ("positions", "roles")})
        logits = torch.stack([found.start_logits, found.end_logits], dim=1).float()
        return logits.masked_fill(batch["attention_mask"][:, None] == 0, _HIDDEN)

    def score(self, split: str, outputs: np.ndarray) -> dict[str, float]:
        """The metrics of SQuAD's official scripts, in percent, and "loss", the mean over the targets.

        best_... judge the best spans of all questions by their null odds, so that their thresholds are values for
        --null_score_diff_threshold (but for 0, which also stands for: best without any answer).
        """
        rows = self._split(split)
        if ANSWERS not in rows.column_names:
            raise DataError(f"the {split} split of {self.name} has no answers, so it has no score; predict it instead (launch/predict.py)")
        answers = dict(zip(rows[ID], self._answers(rows, self._tables[split], outputs), strict=True))
        references = dict(zip(rows[ID], rows[ANSWERS], strict=True))
        texts = {name: answer.text for name, answer in answers.items()}
        loss = float(WindowScores.of(outputs, self._candidates).losses.astype(np.float64).sum()) / (2 * len(outputs))
        if not self.unanswerable:
            return {**squad.squad_v1(texts, references), "loss": loss}
        odds = {name: answer.null_odds or 0.0 for name, answer in answers.items()}
        return {**squad.squad_v2(texts, references, odds, {name: answer.span_text for name, answer in answers.items()}), "loss": loss}

    def _answers(self, rows: datasets.Dataset, table: TokenTable, outputs: np.ndarray) -> list[Answer]:
        threshold = self._data.null_score_diff_threshold or 0.0
        found = find_answers(
            WindowScores.of(outputs, self._candidates),
            table,
            rows[CONTEXT][:],
            n_best=self.n_best,
            max_tokens=self._data.max_answer_length or 30,
            null_threshold=threshold if self.unanswerable else None,
        )
        return list(found)

    def prediction_files(self, split: str) -> tuple[str, ...]:
        """Those of transformers' run_qa, with the split's name in front."""
        names = ("predictions", "nbest_predictions", *(("null_odds",) if self.unanswerable else ()))
        return tuple(f"{split}_{name}.json" for name in names)

    def write_predictions(self, split: str, outputs: np.ndarray, folder: Path) -> None:
        """<split>_predictions.json (id: text), _nbest_predictions.json (id: list of `Answer.n_best`), _null_odds.json (id: number)."""
        rows = self._split(split)
        answers = dict(zip(rows[ID], self._answers(rows, self._tables[split], outputs), strict=True))
        contents: list[dict[str, Any]] = [
            {name: answer.text for name, answer in answers.items()},
            {name: answer.n_best for name, answer in answers.items()},
            {name: answer.null_odds for name, answer in answers.items()},
        ]
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(self.prediction_files(split), contents, strict=False):
            (folder / name).write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")

    def encode_questions(
        self, questions: Sequence[str], contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[EncodedSplit, "Questions"]:
        """Questions given one by one, each with its context or all with one. Raises DataError where they do not fit together."""
        given = [*contexts] * len(questions) if len(contexts) == 1 else [*contexts]
        if len(given) != len(questions) or not all(text.strip() for text in (*questions, *given)):
            raise DataError(
                f"got {len(questions)} questions and {len(contexts)} contexts; give --context once, or once per --question, nothing empty"
            )
        rows = datasets.Dataset.from_dict({ID: [str(i) for i in range(len(given))], QUESTION: [*questions], CONTEXT: given})
        encoded, table = self._encoded(rows, tokenizer)
        return encoded, Questions(rows, table)

    def answers(self, questions: "Questions", outputs: np.ndarray) -> list[Answer]:
        """The answers to questions that `encode_questions` took, from their outputs."""
        return self._answers(questions.rows, questions.table, outputs)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions that come from no file, and their windows."""

    rows: datasets.Dataset
    table: TokenTable


def _losses(logits: Tensor, positions: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, positions, reduction="none")
