"""Question answering behind the real launchers: ranks and stages, the saved run scored and asked, encoders of three kinds."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, DebertaV2Config, DebertaV2Model, RobertaConfig, RobertaModel

from adakron.packaged import packaged_minilm
from tests.helpers.launch import deepspeed, logged, python, results
from tests.helpers.shared import shared_data

pytestmark = pytest.mark.launcher


def save_encoder(folder: Path, kind: str) -> Path:
    """A random encoder of two layers with the real BERT vocabulary."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 130, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "bert":
        BertModel(BertConfig(**sizes)).save_pretrained(folder)
    elif kind == "roberta":
        RobertaModel(RobertaConfig(**sizes | {"type_vocab_size": 2})).save_pretrained(folder)
    else:
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "position_buckets": 16}
        DebertaV2Model(DebertaV2Config(**sizes | relative)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged_minilm()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first questions of SQuAD: 30 for training, whose windows do not divide into batches of 8."""
    folder = tmp_path_factory.mktemp("data")
    for split, name, count in (("train", "train_subset", 30), ("validation", "validation", 20)):
        lines = (shared_data("squad_v1") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def train(model: Path, folder: Path, *more: str, stage: str = "zero2_fp32", ranks: int = 1) -> Path:
    finished = deepspeed(
        "launch/train.py", "--deepspeed", f"ds_configs/{stage}.json", "--model_name_or_path", str(model), "--output_dir", str(folder),
        "--max_seq_length", "96", "--doc_stride", "32", "--logging_steps", "1", "--learning_rate", "1e-2",
        "--warmup_steps", "1", "--save_strategy", "no", *more, ranks=ranks,
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    return folder


def scored(folder: Path, *more: str) -> dict[str, float]:
    finished = python("launch/evaluate.py", str(folder), *more)
    assert finished.returncode == 0, finished.output
    return {name: float(value) for name, value in (line.split(" = ") for line in finished.stdout.splitlines() if " = " in line)}


def test_one_rank_and_two_make_the_same_run_which_is_scored_and_asked(bert: Path, sample: Path, tmp_path: Path) -> None:
    data = ("--task_name", "squad_v1", "--data_dir", str(sample), "--max_steps", "8", "--label_smoothing_factor", "0.1")
    one = train(bert, tmp_path / "one", *data, "--per_device_train_batch_size", "8")
    two = train(
        bert, tmp_path / "two", *data, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--per_device_eval_batch_size", "3", stage="zero3_fp32", ranks=2,
    )  # fmt: skip
    losses = logged(one)
    assert losses[-1] < losses[0] - 0.1
    assert logged(two) == pytest.approx(losses, rel=1e-5)
    trained = results(one)
    assert trained["head_parameters"] == 2 * 32 + 2
    for name in ("eval_exact_match", "eval_f1", "eval_loss"):
        assert results(two)[name] == pytest.approx(trained[name], rel=1e-4)
    again = scored(one)
    assert {name: again[name] for name in ("eval_exact_match", "eval_f1")} == pytest.approx(
        {name: trained[name] for name in ("eval_exact_match", "eval_f1")}, abs=1e-6
    )
    assert again["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-4)

    predicted = python("launch/predict.py", str(one), "--split", "validation")
    assert predicted.returncode == 0, predicted.output
    assert "20 predictions in" in predicted.stdout
    questions = [json.loads(line) for line in (sample / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = json.loads((one / "validation_predictions.json").read_text(encoding="utf-8"))
    assert list(answers) == [question["id"] for question in questions]
    assert all(answers[question["id"]] in question["context"] for question in questions)
    taken = python("launch/predict.py", str(one), "--split", "validation")
    assert "validation_predictions.json" in taken.stderr
    assert "exists; choose another folder" in taken.stderr
    asked = python(
        "launch/predict.py", str(one), "--question", questions[0]["question"], "--question", "Who?", "--context", questions[0]["context"]
    )
    assert asked.returncode == 0, asked.output
    lines = asked.stdout.splitlines()[-2:]
    assert lines[0].startswith(f"{answers[questions[0]['id']]} (")
    assert [line.split("\t")[1] for line in lines] == [questions[0]["question"], "Who?"]


@pytest.mark.parametrize("kind", ["roberta", "deberta"])
def test_questions_that_may_have_no_answer_with_other_encoders(kind: str, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / kind, kind)
    lines = (shared_data("squad_v2") / "validation_cs224n.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = ("--task_name", "squad_v2", "--train_file", str(tmp_path / "data.jsonl"), "--validation_file", str(tmp_path / "data.jsonl"))
    folder = train(
        model, tmp_path / "run", *data, "--max_steps", "3", "--per_device_train_batch_size", "4", "--method", "madakron",
        "--num_experts", "2", "--consistency_weight", "1", "--test_file", str(tmp_path / "data.jsonl"),
        "--do_train", "--do_eval", "--do_predict",
    )  # fmt: skip
    trained = results(folder)
    assert trained["eval_total"] == 24
    assert trained["eval_HasAns_total"] + trained["eval_NoAns_total"] == 24
    odds = json.loads((folder / "test_null_odds.json").read_text(encoding="utf-8"))
    predictions = json.loads((folder / "test_predictions.json").read_text(encoding="utf-8"))
    assert {name: text == "" for name, text in predictions.items()} == {name: value > 0 for name, value in odds.items()}
    threshold = trained["eval_best_f1_thresh"]
    again = scored(folder, f"--null_score_diff_threshold={threshold}")
    assert again["eval_best_f1"] == pytest.approx(trained["eval_best_f1"], abs=1e-4)
    # 0 says that no answer at all is best, and is no threshold then (the official script's rule).
    if threshold:
        assert again["eval_f1"] == pytest.approx(trained["eval_best_f1"], abs=1e-4)


def test_methods_of_peft_answer_questions_too(bert: Path, sample: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = train(
        bert, tmp_path / "run", "--task_name", "qa", "--data_dir", str(sample), "--max_steps", "2", "--method", "lora",
        "--per_device_train_batch_size", "4",
    )  # fmt: skip
    assert scored(folder)["eval_f1"] == pytest.approx(results(folder)["eval_f1"], abs=1e-6)
