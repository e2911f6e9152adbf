"""launch/predict.py with several runs, in this process."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adakron import distributed
from adakron.errors import AdaKronError, CheckpointError, ConfigError, DataError
from adakron.launcher import World
from launch import predict
from tests.helpers import tiny
from tests.helpers.saved_runs import write_run

THREE = {"num_labels": 3, "id2label": {"0": "bad", "1": "fair", "2": "good"}, "problem_type": "single_label_classification"}
NUMBER = {"num_labels": 1, "problem_type": "regression"}
TEXTS = tiny.sentences(7, seed=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one backbone on sentences (mood, stars: own data, score: a number) and on pairs; and one of another backbone."""
    root = tmp_path_factory.mktemp("runs")
    model = tiny.save_tiny_bert(root / "model")
    own: dict[str, Any] = {"task_name": "text", "text_column": "sentence", "label_column": "label"}
    return {
        "mood": write_run(root / "mood", model, seed=1, task_name="sst2"),
        "stars": write_run(root / "stars", model, seed=2, options=THREE, method="madakron", max_seq_length=6, **own),
        "score": write_run(root / "score", model, seed=3, options=NUMBER, method="pfeiffer", **own),
        "pairs": write_run(root / "pairs", model, seed=4, task_name="mrpc"),
        "same": write_run(root / "same", model, seed=5, task_name="rte"),
        "other": write_run(root / "other", tiny.save_tiny_bert(root / "other-model", seed=1), seed=6, task_name="sst2"),
    }


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "form_group", lambda *arguments: None)


def call(*arguments: object) -> None:
    predict.main([str(argument) for argument in arguments], World())


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[str]]:
    call(*arguments)
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def flags(name: str, values: Sequence[object]) -> list[object]:
    return [part for value in values for part in (f"--{name}", value)]


def test_every_text_is_predicted_by_its_run(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = ["stars", "mood", "score", "mood", "stars", "stars", "score"]
    others = flags("adapter", [f"{name}={runs[name]}" for name in ("stars", "score")])
    lines = printed(capsys, runs["mood"], *others, *flags("text", TEXTS), *flags("adapter_name", names), "--per_device_eval_batch_size", 4)
    assert [(line[0], line[2]) for line in lines] == list(zip(names, TEXTS, strict=True))
    single = {name: [line[0] for line in printed(capsys, runs[name], *flags("text", TEXTS))] for name in set(names)}
    assert [line[1] for line in lines] == [single[name][row] for row, name in enumerate(names)]
    # The runs do differ, and each speaks of its own classes.
    assert {line[1].split()[0] for line in lines if line[0] == "mood"} <= {"negative", "positive"}
    assert {line[1].split()[0] for line in lines if line[0] == "stars"} <= set(THREE["id2label"].values())
    assert len({float(line[1]) for line in lines if line[0] == "score"}) == 2


def test_pairs(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*flags("text", TEXTS[:3]), *flags("text_pair", TEXTS[3:6])]
    names = ["same", "pairs", "same"]
    lines = printed(capsys, runs["pairs"], "--adapter", f"same={runs['same']}", *texts, *flags("adapter_name", names))
    single = {name: [line[0] for line in printed(capsys, runs[name], *texts)] for name in set(names)}
    assert [line[1] for line in lines] == [single[name][row] for row, name in enumerate(names)]


def test_a_file_whose_column_names_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    names = ["stars", "mood", "score", "mood", "stars", "stars", "score"]
    # Labels of several tasks in one column are nobody's business here.
    rows = [{"sentence": text, "run": name, "label": f"of {name}"} for text, name in zip(TEXTS, names, strict=True)]
    file = tiny.write_jsonl(tmp_path / "mixed.jsonl", rows)
    others = flags("adapter", [f"{name}={runs[name]}" for name in ("stars", "score")])
    call(runs["mood"], *others, "--test_file", file, "--adapter_column", "run", "--output_dir", tmp_path / "out")
    with (tmp_path / "out" / "predict_results_test.tsv").open() as written:
        table = list(csv.DictReader(written, delimiter="\t"))
    assert [(row["index"], row["adapter"]) for row in table] == [(str(index), name) for index, name in enumerate(names)]
    plain = tiny.write_jsonl(tmp_path / "plain.jsonl", [{"sentence": text} for text in TEXTS])
    for name in set(names):
        call(runs[name], "--test_file", plain, "--output_dir", tmp_path / name)
        with (tmp_path / name / "predict_results_test.tsv").open() as written:
            single = list(csv.DictReader(written, delimiter="\t"))
        own = [index for index, other in enumerate(names) if other == name]
        assert [table[index]["prediction"] for index in own] == [single[index]["prediction"] for index in own]
    with pytest.raises(ConfigError, match=r"predict_results_test.tsv exists"):
        call(runs["mood"], *others, "--test_file", file, "--adapter_column", "run", "--output_dir", tmp_path / "out")
    call(
        runs["mood"], *others, "--test_file", file, "--adapter_column", "run", "--output_dir", tmp_path / "few", "--max_predict_samples", 2
    )  # fmt: skip
    assert len((tmp_path / "few" / "predict_results_test.tsv").read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize("level", [0, 1])
def test_random_experts_of_a_run_are_the_same_every_time_and_for_every_number_of_ranks(
    level: int, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runs["mood"].parent / "model"
    random = write_run(
        tmp_path / "random", model, seed=8, options=NUMBER, task_name="text", text_column="sentence", label_column="label",
        method="madakron", num_experts=8, inference_level=level,
    )  # fmt: skip
    names = ["random", "mood"] * 3 + ["random"]
    arguments = [runs["mood"], "--adapter", f"random={random}", *flags("text", TEXTS), *flags("adapter_name", names)]
    arguments += ["--per_device_eval_batch_size", 2]
    first = printed(capsys, *arguments)
    assert len({line[1] for line in first if line[0] == "random"}) > 1
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert printed(capsys, *arguments) == first
    # Two ranks, one after the other: the second stops where it would give its part to the first.
    seconds: list[Any] = []

    def stop(part: Any) -> None:
        seconds.append(part)
        raise InterruptedError

    texts = [str(argument) for argument in arguments]
    monkeypatch.setattr(distributed, "all_gather_object", stop)
    with pytest.raises(InterruptedError):
        predict.main(texts, World(rank=1, world_size=2))
    monkeypatch.setattr(distributed, "all_gather_object", lambda part: [part, *seconds])
    predict.main(texts, World(rank=0, world_size=2))
    assert seconds[0] and [line.split("\t") for line in capsys.readouterr().out.splitlines()] == first


def test_bad_input(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "t.jsonl", [{"sentence": "a film", "run": "mood"}, {"sentence": "a plot", "run": "moood"}])
    mood, text, name = runs["mood"], ("--text", "a film"), ("--adapter_name", "mood")
    stars = ("--adapter", f"stars={runs['stars']}")
    cases: list[tuple[type[AdaKronError], str, list[object]]] = [
        (ConfigError, "choose among several runs; name the others with --adapter NAME=RUN", [mood, *text, *name]),
        (ConfigError, "--adapter_name is given 1 times for 2 texts", [mood, *stars, *text, *text, *name]),
        (ConfigError, "--text_pair is given 2 times for 1 texts", [mood, *stars, *text, *name, *flags("text_pair", "ab")]),
        (ConfigError, "--adapter needs --text with --adapter_name, or --test_file with --adapter_column", [mood, *stars]),
        (ConfigError, "--adapter_column belongs to --test_file", [mood, *stars, *text, *name, "--adapter_column", "run"]),
        (
            ConfigError,
            "--split is not used with several runs",
            [mood, *stars, "--test_file", file, "--adapter_column", "run", "--split", "test"],
        ),
        (ConfigError, "--adapter 'stars' must be NAME=RUN", [mood, "--adapter", "stars", *text, *name]),
        (ConfigError, "the name mood is taken by", [mood, "--adapter", f"mood={mood}", *text, *name]),
        (DataError, "row 0 is for the adapter 'moon'; there are mood, stars", [mood, *stars, *text, "--adapter_name", "moon"]),
        (
            DataError,
            "row 1 is for the adapter 'moood'; there are mood, stars",
            [mood, *stars, "--test_file", file, "--adapter_column", "run"],
        ),
        (DataError, "has no column 'who'; it has sentence, run", [mood, *stars, "--test_file", file, "--adapter_column", "who"]),
        (
            ConfigError,
            "the runs read different texts .mood: sentence; pairs: sentence1 and sentence2., .* need one text each, or a pair each",
            [mood, "--adapter", f"pairs={runs['pairs']}", *text, *name],
        ),
        (CheckpointError, "was trained on another backbone", [mood, "--adapter", f"other={runs['other']}", *text, *name]),
        (CheckpointError, "it is not the output folder of a finished", [mood, "--adapter", f"x={tmp_path}", *text, *name]),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            call(*arguments)


def test_another_backbone_can_be_insisted_on(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [runs["mood"], "--adapter", f"other={runs['other']}", "--text", "a film", "--adapter_name", "other"]
    assert printed(capsys, *arguments, "--allow_other_backbone")[0][0] == "other"
