"""Causal language models behind the real launchers: generation data and plain text, ranks and stages, from nothing to a backbone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adakron.causal import accept_targets
from adakron.config import DataConfig, TrainingConfig
from adakron.tasks import create_task
from tests.helpers.launch import deepspeed, logged, python, results
from tests.helpers.shared import shared_data

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GPT-2 with the real GPT-2 tokenizer, cut to E2E's tokens."""
    folder = tmp_path_factory.mktemp("decoder") / "gpt2"
    tokenizer, data = shared_data("tokenizers") / "gpt2", shared_data("e2e_nlg")
    finished = python(
        "launch/new_decoder.py", str(tokenizer), "--output_dir", str(folder), "--vocabulary_from", f"e2e_nlg={data}",
        "--n_layer", "2", "--n_embd", "32", "--n_head", "2", "--n_positions", "160",
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    return folder


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of E2E: 42 for training, which do not divide into batches of 8."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 42), ("validation", 20), ("test", 10)):
        lines = (shared_data("e2e_nlg") / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def train(model: Path, data: Path, folder: Path, *more: str, stage: str = "zero2_fp32", ranks: int = 1) -> Path:
    finished = deepspeed(
        "launch/train.py", "--deepspeed", f"ds_configs/{stage}.json", "--model_name_or_path", str(model), "--task_name", "e2e_nlg",
        "--data_dir", str(data), "--output_dir", str(folder), "--bottleneck_dim", "8", "--factor_order", "b_major", "--max_steps", "7",
        "--logging_steps", "1", "--label_smoothing_factor", "0.1", "--learning_rate", "1e-2", "--warmup_steps", "1", "--save_strategy",
        "no", *more, ranks=ranks,
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    return folder


def test_layouts_and_packing_make_the_same_run(gpt2: Path, sample: Path, tmp_path: Path) -> None:
    plain = train(gpt2, sample, tmp_path / "plain", "--per_device_train_batch_size", "8")
    other = train(
        gpt2, sample, tmp_path / "other", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--pack",
        "--per_device_eval_batch_size", "3", "--gradient_checkpointing", "true", stage="zero3_fp32", ranks=2,
    )  # fmt: skip
    losses = logged(plain)
    assert losses[-1] < losses[0] - 0.02
    assert logged(other) == pytest.approx(losses, rel=1e-5)
    assert results(other)["eval_perplexity"] == pytest.approx(results(plain)["eval_perplexity"], rel=1e-4)
    assert results(plain)["head_parameters"] == 0
    # Per layer (D + 1) 2 + (D + 1) 4 + (8 + 1) D.
    assert results(plain)["adapter_parameters"] == 2 * (33 * 2 + 33 * 4 + 9 * 32)


def test_a_mixture_with_consistency_then_scored_and_not_predicted(gpt2: Path, sample: Path, tmp_path: Path) -> None:
    folder = train(
        gpt2, sample, tmp_path / "run", "--per_device_train_batch_size", "4", "--method", "madakron_partial", "--num_experts", "3",
        "--expert_scores", "random", "--consistency_weight", "100", stage="zero2", ranks=2,
    )  # fmt: skip
    scored = python("launch/evaluate.py", str(folder))
    assert scored.returncode == 0, scored.output
    found = dict(line.split(" = ") for line in scored.stdout.splitlines() if " = " in line)
    assert float(found["eval_perplexity"]) == pytest.approx(results(folder)["eval_perplexity"], rel=1e-3)
    refused = python("launch/predict.py", str(folder), "--split", "test")
    assert refused.returncode != 0
    assert "predicts by generating, which launch/generate.py does" in refused.stderr


def test_a_decoder_trained_whole_becomes_a_backbone(gpt2: Path, sample: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The Eagle is a pub near the river. " * 40, encoding="utf-8")
    finished = deepspeed(
        "launch/train.py", "--deepspeed", "ds_configs/zero2_fp32.json", "--model_name_or_path", str(gpt2), "--task_name", "lm",
        "--train_file", str(text), "--validation_file", str(text), "--method", "full", "--max_seq_length", "32", "--max_steps", "12",
        "--output_dir", str(tmp_path / "full"), "--learning_rate", "1e-2", "--per_device_train_batch_size", "4",
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    exported = python("launch/convert.py", "model", str(tmp_path / "full"), "--output_dir", str(tmp_path / "model"))
    assert exported.returncode == 0, exported.output
    trained = results(tmp_path / "full")
    assert trained["eval_perplexity"] < 1000, "a uniform guess has that of the vocabulary's size, 7,000 and more"
    assert trained["tuned_parameters"] == trained["backbone_parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    accept_targets(model)
    task = create_task(DataConfig(task_name="lm", validation_file=str(text), max_seq_length=32), TrainingConfig())
    encoded = task.encode("validation", tokenizer)
    with torch.no_grad():
        outputs = task.predict(model, task.collate(encoded, range(len(encoded)), tokenizer.pad_token_id or 0))
    assert task.score("validation", outputs.numpy())["loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
