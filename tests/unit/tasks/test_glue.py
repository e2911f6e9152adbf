import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adakron.config import DataConfig, TrainingConfig
from adakron.errors import ConfigError, DataError
from adakron.tasks import TASK_NAMES, create_task
from adakron.tasks.base import Batch, Task
from adakron.tasks.glue import GLUE_TASKS
from tests.helpers.letters import letter_tokenizer
from tests.helpers.shared import shared_data

TEXTS = [{"sentence": "a b", "label": 1}, {"sentence": "c", "label": 0}, {"sentence": "a b c d e", "label": 1}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_of(folder: Path, task_name: str = "sst2", training: TrainingConfig | None = None, **settings: Any) -> Task:
    return create_task(DataConfig(task_name=task_name, data_dir=str(folder), **settings), training or TrainingConfig())


def logits_model(logits: Tensor) -> Any:
    """A forward function that gives these logits, whatever tensors a model may be called with."""

    def forward(input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        assert input_ids.shape == attention_mask.shape
        return SimpleNamespace(logits=logits)

    return forward


def batch_of(labels: Tensor) -> Batch:
    ones = torch.ones(len(labels), 4, dtype=torch.int64)
    return {"input_ids": ones, "attention_mask": ones, "labels": labels}


@pytest.fixture
def sst2(tmp_path: Path) -> Task:
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "validation.jsonl", TEXTS[:2])
    write(tmp_path / "test.jsonl", [{"sentence": "a", "label": -1}, {"sentence": "b", "label": -1}])
    return task_of(tmp_path)


def test_encode_and_collate(sst2: Task) -> None:
    encoded = sst2.encode("train", letter_tokenizer())
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [1, 0, 1]
    assert encoded.lengths.tolist() == [4, 3, 7]
    assert encoded.target_counts.tolist() == [1, 1, 1]
    batch = sst2.collate(encoded, [1, 0], 0)
    assert batch["input_ids"].tolist() == [[2, 6, 3, 0, 0, 0, 0, 0], [2, 4, 5, 3, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert batch["labels"].dtype == torch.int64


def test_padding_stays_within_the_longest_input_allowed(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", TEXTS)
    task = task_of(tmp_path, max_seq_length=6)
    encoded = task.encode("train", letter_tokenizer())
    assert encoded.truncated == 1
    assert task.collate(encoded, [0, 2], 0)["input_ids"].shape == (2, 6)
    limited = task_of(tmp_path)
    encoded = limited.encode("train", letter_tokenizer(model_max_length=5))
    assert limited.collate(encoded, [0, 2], 0)["input_ids"].shape == (2, 5)


def test_an_unlabelled_split_has_no_labels_and_no_score(sst2: Task, tmp_path: Path) -> None:
    encoded = sst2.encode("test", letter_tokenizer())
    assert encoded.labels is None
    assert "labels" not in sst2.collate(encoded, [0], 0)
    with pytest.raises(DataError, match="the test split of sst2 has no labels, so it has no score"):
        sst2.score("test", np.zeros((2, 2), np.float32))
    sst2.write_predictions("test", np.array([[0.0, 1.0], [2.0, 1.0]], np.float32), tmp_path / "new")
    assert (tmp_path / "new" / "predict_results_test.tsv").read_text(encoding="utf-8") == "index\tprediction\n0\tpositive\n1\tnegative\n"


def test_loss_is_the_sum_of_cross_entropies_in_fp32(sst2: Task) -> None:
    logits = torch.tensor([[0.0, np.log(3.0)], [0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    total, outputs = sst2.loss(logits_model(logits), batch_of(torch.tensor([1, 0])))
    assert total.dtype == outputs.dtype == torch.float32
    assert total.item() == pytest.approx(np.log(4 / 3) + np.log(2), rel=1e-2)
    assert outputs.requires_grad
    total.backward()
    assert logits.grad is not None


def test_label_smoothing_is_torchs_and_is_not_part_of_the_evaluation_loss(tmp_path: Path) -> None:
    write(tmp_path / "validation.jsonl", TEXTS[:2])
    task = task_of(tmp_path, training=TrainingConfig(label_smoothing=0.2))
    logits, labels = torch.tensor([[1.0, 3.0], [0.5, -0.5]]), torch.tensor([1, 0])
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.2)(logits, labels).item() * 2
    assert task.loss(logits_model(logits), batch_of(labels))[0].item() == pytest.approx(expected)
    plain = torch.nn.functional.cross_entropy(logits, labels).item()
    assert task.score("validation", logits.numpy()) == {"accuracy": 1.0, "loss": pytest.approx(plain)}


def test_regression_loss_and_score(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (1.0, 3.0, 2.0)]
    write(tmp_path / "validation.jsonl", rows)
    task = task_of(tmp_path, "stsb")
    encoded = task.encode("validation", letter_tokenizer())
    assert encoded.labels is not None
    assert encoded.labels.dtype == np.float32
    logits = torch.tensor([[1.5], [3.0], [4.0]])
    total, _ = task.loss(logits_model(logits), batch_of(torch.from_numpy(encoded.labels)))
    assert total.item() == pytest.approx(0.25 + 0.0 + 4.0)
    scores = task.score("validation", logits.numpy())
    assert scores["loss"] == pytest.approx(4.25 / 3)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1.5, 3, 4], [1, 3, 2])[0, 1])
    task.write_predictions("validation", logits.numpy(), tmp_path)
    assert (tmp_path / "predict_results_validation.tsv").read_text(encoding="utf-8").splitlines()[1:] == [
        "0\t1.5000",
        "1\t3.0000",
        "2\t4.0000",
    ]
    assert task.model_options() == {"num_labels": 1, "problem_type": "regression"}


def test_sample_limits_keep_the_first_rows_of_the_split_they_are_for(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", TEXTS)
    task = task_of(tmp_path, max_train_samples=2, max_eval_samples=1, max_predict_samples=50)
    assert {name: len(split) for name, split in task.splits().items()} == {"train": 2, "validation": 1, "test": 3}
    assert len(task.encode("train", letter_tokenizer())) == 2
    assert task.splits()["train"]["sentence"][:] == ["a b", "c"]
    assert task.score("validation", np.array([[0.0, 1.0]]))["accuracy"] == 1.0


def test_problems_of_all_splits_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"sentence": "a", "label": 5}])
    write(tmp_path / "validation.jsonl", [{"text": "a", "label": 0}])
    task = task_of(tmp_path)
    with pytest.raises(DataError) as caught:
        task.splits()
    first, second = str(caught.value).split("\n")
    assert "row 0: label is 5; it must be an integer from 0 to 1, or one of negative, positive" in first
    assert "has no column 'sentence'; it has text, label" in second


def test_a_missing_split_names_the_flags(sst2: Task, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    write(tmp_path / "only" / "validation.jsonl", TEXTS)
    task = task_of(tmp_path / "only")
    with pytest.raises(DataError, match="task sst2 has no train split, only validation; name its file with --train_file"):
        task.encode("train", letter_tokenizer())


def test_every_glue_task_is_described_without_its_data() -> None:
    for name, spec in GLUE_TASKS.items():
        task = create_task(DataConfig(task_name=name, data_dir="nowhere"), TrainingConfig())
        assert task.metric_for_best in task.metric_names
        assert task.auto_class == "AutoModelForSequenceClassification"
        options = task.model_options()
        assert options["num_labels"] == (len(spec.label.names) or 1)
        assert {options["label2id"][label]: label for label in options["label2id"]} == options["id2label"] if spec.label.names else True
    best = {name: spec.metric_for_best for name, spec in GLUE_TASKS.items() if spec.metric_for_best != "accuracy"}
    assert best == {"cola": "matthews_correlation", "stsb": "pearson"}
    assert [GLUE_TASKS[name].label.names.index("entailment") for name in ("mnli", "qnli", "rte", "wnli")] == [0, 0, 0, 1]


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_the_metric_names_are_what_score_returns(name: str, tmp_path: Path) -> None:
    spec = GLUE_TASKS[name]
    write(tmp_path / "validation.jsonl", [dict.fromkeys(spec.text_columns, "a") | {"label": label} for label in (0, 1, 1)])
    task = task_of(tmp_path, name)
    outputs = np.eye(3, 1 if not spec.label.names else len(spec.label.names), dtype=np.float32)
    assert set(task.score("validation", outputs)) == {*task.metric_names, "loss"}


COUNTS = {
    "cola": ({0: 2528, 1: 6023}, {0: 322, 1: 721}), "sst2": ({0: 29780, 1: 37569}, {0: 428, 1: 444}),
    "mrpc": ({0: 1194, 1: 2474}, {0: 129, 1: 279}), "rte": ({0: 1249, 1: 1241}, {0: 146, 1: 131}),
    "wnli": ({0: 323, 1: 312}, {0: 40, 1: 31}),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_real_glue_data(name: str) -> None:
    splits = task_of(shared_data(name), name).splits()
    assert (dict(Counter(splits["train"]["label"][:])), dict(Counter(splits["validation"]["label"][:]))) == COUNTS[name]
    if "test" in splits:
        assert "label" not in splits["test"].column_names


def test_real_stsb_and_mnli() -> None:
    splits = task_of(shared_data("stsb"), "stsb").splits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 5749, "validation": 1500, "test": 1379}
    assert np.mean(splits["train"]["label"][:]) == pytest.approx(2.70, abs=0.005)
    folder = shared_data("mnli")
    files: dict[str, Any] = {"validation_file": str(folder / "validation_matched.jsonl"), "train_file": str(folder / "train_subset.jsonl")}
    mnli = create_task(DataConfig(task_name="mnli", **files), TrainingConfig()).splits()
    assert dict(Counter(mnli["validation"]["label"][:])) == {0: 3479, 1: 3123, 2: 3213}


@pytest.mark.parametrize(
    ("name", "hint"), [("sst-2", "did you mean sst2"), ("MRPC", "did you mean mrpc"), ("quikstart", "did you mean quickstart")]
)
def test_an_unknown_task_lists_the_known_ones(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create_task(DataConfig(task_name=name), TrainingConfig())
    assert f"task_name is {name!r}; it must be one of {', '.join(TASK_NAMES)}; {hint}? (set --task_name)" == str(caught.value)


def test_settings_that_a_task_would_ignore_are_errors() -> None:
    with pytest.raises(ConfigError) as caught:
        create_task(DataConfig(data_dir="x", text_column="t"), TrainingConfig())
    assert caught.value.problems == [
        "text_column is t, but task quickstart has its own columns and labels; drop --text_column, or set --task_name text",
        "data_dir is x, but task quickstart writes its own reviews; drop --data_dir, or set --task_name text",
    ]
