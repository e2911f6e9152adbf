"""Tagged words behind the real launchers."""

import random
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.launch import deepspeed, logged, python, results

pytestmark = pytest.mark.launcher


def write_corpus(folder: Path) -> Path:
    """Sentences in which a word's tag follows from the word."""
    draw = random.Random(0)
    words = {"B-PER": tiny.WORDS[:3], "I-PER": tiny.WORDS[3:5], "B-LOC": tiny.WORDS[5:8], "I-LOC": tiny.WORDS[8:10], "O": tiny.WORDS[10:]}
    for split, count in (("train", 43), ("validation", 15), ("test", 6)):
        rows = []
        for _ in range(count):
            spans = draw.choices((["B-PER"], ["B-PER", "I-PER"], ["B-LOC", "I-LOC"], ["O"], ["O", "O"]), k=draw.randint(1, 4))
            tags = [tag for span in spans for tag in span]
            rows.append({"tokens": [draw.choice(words[tag]) for tag in tags], "tags": tags})
        tiny.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_ranks_and_stages_learn_the_same_and_the_saved_run_scores_the_same(tmp_path: Path) -> None:
    model, data = tiny.save_tiny_bert(tmp_path / "model", dropout=0.1), write_corpus(tmp_path / "data")

    def train(folder: str, *more: str, stage: str, ranks: int) -> Path:
        finished = deepspeed(
            "launch/train.py", "--deepspeed", f"ds_configs/{stage}.json", "--model_name_or_path", str(model), "--task_name", "ner",
            "--data_dir", str(data), "--output_dir", str(tmp_path / folder), "--bottleneck_dim", "8", "--max_steps", "60",
            "--logging_steps", "1", "--learning_rate", "3e-2", "--save_strategy", "no", *more, ranks=ranks,
        )  # fmt: skip
        assert finished.returncode == 0, finished.output
        return tmp_path / folder

    one = train("one", "--per_device_train_batch_size", "8", "--do_train", "--do_eval", "--do_predict", stage="zero2_fp32", ranks=1)
    two = train("two", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", stage="zero3_fp32", ranks=2)
    # Sentences have unlike numbers of targets: a mean over sentences, micro-batches or ranks would differ.
    assert logged(two) == pytest.approx(logged(one), rel=1e-5)
    scores = results(one)
    assert scores["eval_f1"] > 0.5
    scored = python("launch/evaluate.py", str(one))
    found = dict(line.split(" = ") for line in scored.stdout.splitlines() if " = " in line)
    for name in ("precision", "recall", "f1", "accuracy", "loss"):
        assert float(found[f"eval_{name}"]) == pytest.approx(scores[f"eval_{name}"], abs=1e-6)
    lines = (one / "predict_results_test.tsv").read_text().splitlines()
    assert len(lines) == 1 + 6 and set(" ".join(line.split("\t")[1] for line in lines[1:]).split()) <= {
        "O",
        "B-PER",
        "I-PER",
        "B-LOC",
        "I-LOC",
    }
