"""Questions on a context: which tokens are the answer, the loss, and how windows become answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from adakron.config import DataConfig, TrainingConfig
from adakron.data.encoding import TokenTable
from adakron.data.offsets import trimmed
from adakron.errors import DataError
from adakron.objectives import consistency_sum
from adakron.packaged import packaged_minilm
from adakron.scores.squad import squad_v1, squad_v2
from adakron.tasks.base import Batch
from adakron.tasks.qa import QuestionTask
from adakron.tasks.qa.answers import Answer, find_answers
from adakron.tasks.qa.labels import answer_positions
from adakron.tasks.qa.spans import WindowScores, best_spans, window_outputs
from tests.helpers.letters import letter_tokenizer
from tests.helpers.questions import model, row, task_of
from tests.helpers.shared import shared_data

# --- labels ---------------------------------------------------------------------------------------------------------------------------


def test_a_window_with_half_an_answer_has_none(tmp_path: Path) -> None:
    # Windows hold "b c d e", "d e f g" and "f g h", behind three other tokens.
    rows = [row("edge", "d e"), row("crossing", "e f g h"), row("first", "h", "b"), row("none")]
    encoded = task_of(tmp_path, rows).encode("validation", letter_tokenizer())
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [
        [5, 6], [3, 4], [0, 0],
        [0, 0], [0, 0], [0, 0],
        [0, 0], [0, 0], [5, 5],
        [0, 0], [0, 0], [0, 0],
    ]  # fmt: skip
    assert encoded.target_counts.tolist() == [2] * 12, "the position of the start and that of the end"


def test_an_answer_inside_of_words_takes_the_whole_words() -> None:
    table = TokenTable(
        features={
            "roles": np.array([2, 1, 1, 1]), "char_starts": np.array([-1, 0, 4, 9]), "char_ends": np.array([-1, 3, 8, 12]),
        },
        offsets=np.array([0, 4]), truncated=0, rows=np.array([0]),
    )  # fmt: skip
    # "the cats are", from which "at", " cats" and "cats ".
    for text, start, expected in (("at", 5, [2, 2]), (" cats", 3, [2, 2]), ("cats ", 4, [2, 2]), ("he c", 1, [1, 2]), ("e", 11, [3, 3])):
        assert answer_positions(table, [[text]], [[start]]).tolist() == [expected], text


# --- loss and outputs -----------------------------------------------------------------------------------------------------------------


def batch_of(task: QuestionTask, rows: list[int]) -> Batch:
    return task.collate(task.encode("validation", letter_tokenizer()), rows, 0)


def test_the_loss_is_a_sum_over_starts_and_ends_and_knows_no_padding(tmp_path: Path) -> None:
    task = task_of(tmp_path, [row("a", "c d"), row("b", "h")], pad_to_multiple_of=1)
    batch = batch_of(task, [0, 5])  # eight and seven tokens
    logits = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    total, outputs = task.loss(model(logits), batch)
    wide = logits.detach().float()
    by_hand = sum(
        F.cross_entropy(wide[i, kind, :width], torch.tensor(place))
        for i, width, places in ((0, 8, (4, 5)), (1, 7, (5, 5)))
        for kind, place in enumerate(places)
    )
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(float(by_hand), rel=1e-6)
    assert outputs.shape == (4, 8), "one row of logits per target"
    total.backward()
    assert logits.grad is not None
    assert logits.grad[1, :, 7].abs().sum() == 0
    assert torch.isfinite(consistency_sum(outputs, outputs.flip(0), task.output_kind))
    parts = (task.loss(model(wide[i : i + 1, :, :width]), batch_of(task, [window]))[0] for i, width, window in ((0, 8, 0), (1, 7, 5)))
    assert sum(part.item() for part in parts) == pytest.approx(total.item(), rel=1e-6)


def test_label_smoothing_is_over_the_tokens_there_are(tmp_path: Path) -> None:
    task = task_of(tmp_path, [row("b", "h")], label_smoothing=0.2, pad_to_multiple_of=16, max_seq_length=8)
    batch = batch_of(task, [2, 0])
    logits = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1))
    expected = sum(
        F.cross_entropy(logits[i, :, :width], torch.tensor(places), label_smoothing=0.2, reduction="sum")
        for i, width, places in ((0, 7, (5, 5)), (1, 8, (0, 0)))
    )
    assert task.loss(model(logits), batch)[0].item() == pytest.approx(float(expected), rel=1e-6)


def test_outputs_hold_the_best_of_the_context_and_the_null_score(tmp_path: Path) -> None:
    task = task_of(tmp_path, [row("b", "h")], n_best_size=4)
    logits = torch.zeros(1, 2, 8)
    logits[0, 0] = torch.tensor([1.0, 99.0, 99.0, 0.5, 2.0, -1.0, 99.0, 99.0])  # not of the context: 0 to 2, 6 and padding
    logits[0, 1] = torch.tensor([0.25, 99.0, 99.0, 3.0, 0.0, 4.0, 99.0, 99.0])
    outputs = task.predict(model(logits), batch_of(task, [2])).numpy()
    scores = WindowScores.of(outputs, 4)
    assert scores.starts[0].tolist() == [[2.0, 0.5, -1.0, 0.0], [4.0, 3.0, 5.0, -1.0]]
    assert scores.ends[0].tolist() == [[4.0, 3.0, 0.0, 0.0], [5.0, 3.0, 4.0, -1.0]]
    assert scores.null.tolist() == [[1.0, 0.25]]
    loss, _ = task.loss(model(logits), batch_of(task, [2]))
    assert scores.losses[0] == pytest.approx(loss.item())
    assert task.score("validation", np.repeat(outputs, 3, axis=0))["loss"] == pytest.approx(loss.item() / 2)


# --- answers --------------------------------------------------------------------------------------------------------------------------


def test_best_spans_are_those_of_an_exhaustive_search() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 2, 12, generator=generator)
    roles = torch.ones(7, 12, dtype=torch.int64)
    roles[:, 0], roles[:, 1] = 2, 0
    questions = np.array([0, 0, 0, 1, 2, 2, 2])
    outputs = window_outputs(logits, roles, 10, torch.zeros(7)).numpy()
    found = best_spans(WindowScores.of(outputs, 10), questions, 10, max_tokens=3)
    for question in range(3):
        everything = sorted(
            (
                (float(logits[w, 0, i].double() + logits[w, 1, j].double()), w, i, j)
                for w in np.flatnonzero(questions == question).tolist()
                for i in range(2, 12)
                for j in range(i, min(12, i + 3))
            ),
            reverse=True,
        )  # fmt: skip
        own = found.questions == question
        spans = zip(found.windows[own].tolist(), found.firsts[own].tolist(), found.lasts[own].tolist(), strict=True)
        assert list(spans) == [place[1:] for place in everything[:10]]


def answers_of(task: QuestionTask, logits: Tensor, threshold: float | None = 0.0, n_best: int = 3) -> list[Answer]:
    encoded = task.encode("validation", letter_tokenizer())
    batch = task.collate(encoded, range(len(encoded)), 0)
    outputs = window_outputs(logits, batch["roles"], n_best, torch.zeros(len(logits))).numpy()
    table = task._tables["validation"]
    contexts = task.splits()["validation"]["context"][:]
    return list(find_answers(WindowScores.of(outputs, n_best), table, contexts, n_best=n_best, max_tokens=3, null_threshold=threshold))


def test_the_best_window_answers_and_the_lowest_null_score_speaks_against_it(tmp_path: Path) -> None:
    task = task_of(tmp_path, [row("a", "g h")])
    logits = torch.full((3, 2, 8), -10.0)
    logits[:, :, 0] = torch.tensor([[5.0, 4.0], [1.0, 0.5], [3.0, 3.0]])  # null: 9, 1.5, 6
    logits[0, 0, 3], logits[0, 1, 3] = 1.0, 0.0  # "b": 1
    logits[2, 0, 4], logits[2, 1, 5] = 2.0, 1.0  # "g h": 3
    (answer,) = answers_of(task, logits)
    assert (answer.text, answer.span_text, answer.null_odds) == ("g h", "g h", 1.5 - 3.0)
    assert [(entry["text"], entry["start_logit"], entry["end_logit"]) for entry in answer.n_best] == [
        ("g h", 2.0, 1.0), ("", 1.0, 0.5), ("b", 1.0, 0.0),
    ]  # fmt: skip
    weights = np.exp([3.0, 1.5, 1.0])
    assert [entry["probability"] for entry in answer.n_best] == pytest.approx(weights / weights.sum())
    assert answer.probability == pytest.approx(float(weights[0] / weights.sum()))
    (none,) = answers_of(task, logits, threshold=-2.0)
    assert (none.text, none.span_text, none.null_odds) == ("", "g h", -1.5)
    (always,) = answers_of(task, logits, threshold=None)
    assert always.null_odds is None
    assert [entry["text"] for entry in always.n_best][:2] == ["g h", "b"]


def test_the_null_answer_keeps_a_place_in_the_list_however_low_it_is(tmp_path: Path) -> None:
    logits = torch.zeros(3, 2, 8)
    logits[:, :, 0] = -50.0
    (answer,) = answers_of(task_of(tmp_path, [row("a", "b")]), logits)
    assert [bool(entry["text"]) for entry in answer.n_best] == [True, True, False]


def test_answers_stay_inside_of_max_answer_length(tmp_path: Path) -> None:
    logits = torch.full((3, 2, 8), -9.0)
    logits[0, 0, 3], logits[0, 1, 6] = 9.0, 9.0  # "b c d e" has four tokens
    logits[0, 1, 5] = 1.0
    (answer,) = answers_of(task_of(tmp_path, [row("a", "b")]), logits, threshold=None)
    assert answer.text == "b c d"


def test_an_answer_does_not_end_with_the_space_that_is_its_last_token() -> None:
    # SentencePiece cuts "his  hat" into "▁his", "▁" and "▁hat"; the token in the middle has no character that is not a space.
    starts, ends = trimmed("his  hat", np.array([0, 3, 4]), np.array([3, 4, 8]))
    table = TokenTable(
        features={"roles": np.array([2, 1, 1, 1]), "char_starts": np.array([-1, *starts]), "char_ends": np.array([-1, *ends])},
        offsets=np.array([0, 4]), truncated=0, rows=np.array([0]),
    )  # fmt: skip
    logits = torch.full((1, 2, 4), -9.0)
    logits[0, 0, 1] = logits[0, 1, 2] = 9.0  # from "▁his" to "▁"
    outputs = window_outputs(logits, torch.tensor([[2, 1, 1, 1]]), 3, torch.zeros(1)).numpy()
    (answer,) = find_answers(WindowScores.of(outputs, 3), table, ["his  hat"], n_best=3, max_tokens=3, null_threshold=None)
    assert answer.text == "his"


def test_a_context_of_nothing_a_tokenizer_knows_has_no_answer() -> None:
    table = TokenTable(
        features={"roles": np.array([2, 0]), "char_starts": np.array([-1, -1]), "char_ends": np.array([-1, -1])},
        offsets=np.array([0, 2]), truncated=0, rows=np.array([0]),
    )  # fmt: skip
    outputs = window_outputs(torch.zeros(1, 2, 2), torch.tensor([[2, 0]]), 3, torch.zeros(1)).numpy()
    for threshold in (None, 0.0):
        (answer,) = find_answers(WindowScores.of(outputs, 3), table, ["\u200b"], n_best=3, max_tokens=3, null_threshold=threshold)
        assert answer.text == answer.span_text == ""
        assert answer.null_odds is None or np.isfinite(answer.null_odds)


# --- the task as a whole --------------------------------------------------------------------------------------------------------------


def spiked(task: QuestionTask, tokenizer: Any, noise: float = 0.0) -> np.ndarray:
    """Outputs of a model that points at the labels."""
    encoded = task.encode("validation", tokenizer)
    assert encoded.labels is not None
    batch = task.collate(encoded, range(len(encoded)), 0)
    logits = noise * torch.randn(len(encoded), 2, batch["input_ids"].shape[1], generator=torch.Generator().manual_seed(0))
    places = batch["positions"][:, :, None]
    # A window with the answer is surer of it than the others are of its absence.
    logits.scatter_add_(2, places, torch.where(places > 0, 40.0, 20.0))
    return task.predict(model(logits), batch).numpy()


def test_thresholds_of_the_best_scores_give_these_scores(tmp_path: Path) -> None:
    rows = [row(str(i), *(["c d"] if i % 3 else [])) for i in range(30)]
    outputs = spiked(task_of(tmp_path, rows), letter_tokenizer(), noise=15.0)
    scores = task_scores(tmp_path, rows, outputs)
    assert scores["best_f1"] > scores["f1"], "or the case shows nothing"
    again = task_scores(tmp_path, rows, outputs, null_score_diff_threshold=scores["best_f1_thresh"])
    assert again["f1"] == pytest.approx(scores["best_f1"])
    assert again["best_f1"] == scores["best_f1"]


def test_the_best_scores_are_the_official_ones_of_predictions_that_were_never_emptied(tmp_path: Path) -> None:
    rows = [row(str(i), *(["c d"] if i % 3 else [])) for i in range(30)]
    outputs = spiked(task_of(tmp_path, rows), letter_tokenizer(), noise=15.0)
    outputs[:, -3:-1] += 30.0  # so much speaks for no answer that the threshold 0 empties nearly all
    best = {name: value for name, value in task_scores(tmp_path, rows, outputs).items() if name.startswith("best_")}
    assert best["best_f1_thresh"] > 0, "or the case shows nothing"
    references = {one["id"]: one["answers"]["text"] for one in rows}
    found = []
    for threshold in (0.0, 1e9):
        task = task_of(tmp_path, rows, null_score_diff_threshold=threshold)
        task.encode("validation", letter_tokenizer())
        task.write_predictions("validation", outputs, tmp_path)
        predictions, _, odds = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in task.prediction_files("validation"))
        found.append(squad_v2(predictions, references, odds))
    emptied, never = found
    assert best.items() <= never.items()
    assert emptied["best_f1"] < best["best_f1"]


def task_scores(folder: Path, rows: list[dict[str, Any]], outputs: np.ndarray, **data: Any) -> Mapping[str, float]:
    task = task_of(folder, rows, **data)
    task.encode("validation", letter_tokenizer())
    return task.score("validation", outputs)


def test_files_of_predictions(tmp_path: Path) -> None:
    task = task_of(tmp_path, [row("one", "g h"), row("none")])
    assert task.prediction_files("validation") == (
        "validation_predictions.json", "validation_nbest_predictions.json", "validation_null_odds.json",
    )  # fmt: skip
    task.write_predictions("validation", spiked(task, letter_tokenizer()), tmp_path / "out")
    read = {name: json.loads((tmp_path / "out" / name).read_text()) for name in task.prediction_files("validation")}
    assert read["validation_predictions.json"] == {"one": "g h", "none": ""}
    assert read["validation_nbest_predictions.json"]["one"][0]["text"] == "g h"
    assert read["validation_null_odds.json"]["one"] < 0 < read["validation_null_odds.json"]["none"]
    first = task_of(tmp_path, [row("one", "g h")], "squad_v1")
    assert first.prediction_files("test") == ("test_predictions.json", "test_nbest_predictions.json")


def test_questions_without_a_file(tmp_path: Path) -> None:
    task = QuestionTask(DataConfig(task_name="squad_v1", max_seq_length=8, doc_stride=2), TrainingConfig())
    encoded, questions = task.encode_questions(["a", "b"], ["c d e f g h"], letter_tokenizer())
    assert encoded.labels is None
    assert len(encoded) == 4
    logits = torch.zeros(4, 2, 8)
    logits[1, :, 4] = logits[3, :, 5] = 9.0
    outputs = task.predict(model(logits), task.collate(encoded, range(4), 0)).numpy()
    assert [answer.text for answer in task.answers(questions, outputs)] == ["f", "g"]
    with pytest.raises(DataError, match="got 1 questions and 2 contexts"):
        task.encode_questions(["a"], ["b", "c"], letter_tokenizer())


def test_real_questions_are_found_where_their_labels_are(tmp_path: Path) -> None:
    file = shared_data("squad_v1") / "validation.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[::37]]
    task = task_of(tmp_path, rows, "squad_v1", max_seq_length=128, doc_stride=40, n_best_size=20)
    outputs = spiked(task, AutoTokenizer.from_pretrained(packaged_minilm()))
    scores = task.score("validation", outputs)
    # What is left are answers that end inside of a word, or cross every window's edge.
    assert scores["exact_match"] > 99.0
    assert scores["f1"] > 99.5
    task.write_predictions("validation", outputs, tmp_path)
    predictions = json.loads((tmp_path / "validation_predictions.json").read_text(encoding="utf-8"))
    assert squad_v1(predictions, {one["id"]: one["answers"]["text"] for one in rows}) == {
        name: scores[name] for name in ("exact_match", "f1")
    }
