"""Settings of the task and its examples."""

import math
from dataclasses import dataclass
from typing import Literal

from adakron.settings import Settings, flag, positive_problems

DATA_FILES = ("data_dir", "train_file", "validation_file", "test_file")
"""The settings that name files."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """The task and where its examples come from."""

    task_name: str = flag(
        "quickstart",
        "quickstart, a GLUE task (cola sst2 mrpc stsb qqp mnli qnli rte wnli), text (own texts), ner (own tagged words), squad_v1, squad_v2"
        " or qa (own questions on contexts); with a causal language model e2e_nlg, webnlg_2017, dart, pairs (own sources and targets) or lm"
        " (plain text).",
    )
    data_dir: str | None = flag(None, "Folder with train/validation[/test].{jsonl,csv,tsv,parquet}. Default: the hub, for GLUE.")
    train_file: str | None = flag(None, "Training file (jsonl, csv, tsv, parquet; task lm: a text file or a folder); wins over data_dir.")
    validation_file: str | None = flag(None, "Validation file; wins over data_dir.")
    test_file: str | None = flag(None, "Test file for predictions, labelled or not; wins over data_dir.")
    text_column: str | None = flag(None, "Column with the text (task text). Default: the first text column.")
    text_pair_column: str | None = flag(None, "Column with the second text of a pair (task text).")
    label_column: str | None = flag(None, "Column with the label (task text). Default: label.")
    problem: Literal["classification", "regression"] | None = flag(
        None, "Task text only: kind of label. Default: regression for decimal numbers."
    )
    source_column: str | None = flag(None, "Column with the text to generate from (task pairs). Default: source.")
    target_column: str | None = flag(None, "Column with the text to generate, or a list of such texts (task pairs). Default: target.")
    stride: int | None = flag(
        None, "Task lm: tokens that each window of an evaluation predicts; those before are its context. Default: half of max_seq_length."
    )
    pack: bool = flag(False, "Causal language models: put the examples of a micro-batch into common rows, computed apart.")
    doc_stride: int | None = flag(
        None, "Questions: tokens that two windows of a long context have in common. Default: a third of max_seq_length."
    )
    n_best_size: int | None = flag(None, "Questions: starts, ends and answers to keep of each. Default: 20.")
    max_answer_length: int | None = flag(None, "Questions: longest answer, in tokens. Default: 30.")
    version_2_with_negative: bool = flag(False, "Task qa: questions may have no answer, as those of squad_v2.")
    null_score_diff_threshold: float | None = flag(
        None, "squad_v2, or qa likewise: no answer where its score is above the best answer's by more than this. Default: 0."
    )
    max_seq_length: int = flag(128, "Longest input, in tokens; longer ones are truncated, contexts of questions cut into windows.")
    max_train_samples: int | None = flag(None, "Use only the first so many training examples.")
    max_eval_samples: int | None = flag(None, "Use only the first so many validation examples.", "--max_val_samples")
    max_predict_samples: int | None = flag(None, "Use only the first so many test examples.", "--max_test_samples")
    pad_to_multiple_of: int = flag(8, "Batches are padded to a multiple of this many tokens.")

    def problems(self) -> list[str]:
        found = positive_problems(
            self, "max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples", "pad_to_multiple_of", "stride",
            "doc_stride", "n_best_size", "max_answer_length",
        )  # fmt: skip
        if self.null_score_diff_threshold is not None and not math.isfinite(self.null_score_diff_threshold):
            found.append(
                f"null_score_diff_threshold is {self.null_score_diff_threshold}; it must be a finite number, and 1e9 means that there"
                " always is an answer (set --null_score_diff_threshold)"
            )
        return found
