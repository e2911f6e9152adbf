"""PEFT's methods behind the real launcher: the numbers of a plain loop at every stage, and runs that are evaluated again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from tests.helpers.launch import deepspeed, logged, python, results
from tests.integration.test_train import train

pytest.importorskip("peft")

from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adakron import models
from adakron.peft import folders
from adakron.peft.methods import quiet_peft
from tests.helpers.peft_worker import ROWS, Case, backbone, plain_loop, write_request

pytestmark = pytest.mark.launcher

METHODS = ("lora", "dora", "ia3", "lokr", "vera")
# Largest measured over all methods and stages (tests/benchmarks/peft_methods.py): losses 1.2e-7, logits 1.7e-6; in bf16 3e-3, 3.4e-2.
BOUNDS = {False: (1e-6, 5e-6), True: (1e-2, 1e-1)}


def test_every_stage_gives_the_numbers_of_a_plain_loop_and_saves_them(tmp_path):
    cases = [Case(method, name, bf16) for method in METHODS for name, bf16 in (("zero1", False), ("zero2", True), ("zero3", False))]
    request, result = write_request(tmp_path, cases), tmp_path / "result.json"
    finished = deepspeed("--module", "tests.helpers.peft_worker", str(request), str(result), ranks=2)
    assert finished.returncode == 0 and result.exists(), finished.output
    expected = {method: plain_loop(method) for method in METHODS}
    for case, found in zip(cases, json.loads(result.read_text()), strict=True):
        assert "error" not in found, (case.name, found)
        losses, logits = expected[case.method]
        loss_bound, logit_bound = BOUNDS[case.bf16]
        assert found["losses"] == pytest.approx(losses, abs=loss_bound), case.name
        there = torch.tensor(found["logits"])
        assert torch.allclose(there, logits, atol=logit_bound, rtol=0.0), case.name
        dtype = torch.bfloat16 if case.bf16 else torch.float32
        loaded = folders.load(backbone(), tmp_path / case.name, dtype)
        models.cast_parameters(loaded, dtype)
        assert torch.equal(loaded(**ROWS).logits.float(), there), case.name


def evaluated(folder: Path, output: Path) -> dict:
    finished = python("launch/evaluate.py", str(folder), "--output_file", str(output))
    assert finished.returncode == 0, finished.output
    return json.loads(output.read_text())


def test_a_run_is_evaluated_again_and_loads_in_peft(tiny_bert, tiny_data, tmp_path):
    folder = tmp_path / "run"
    settings = tmp_path / "lora.yaml"
    settings.write_text("r: 4\nlora_dropout: 0.1\n")
    more = ("--method", "lora", "--method_config", str(settings), "--learning_rate", "1e-2", "--consistency_weight", "1", "--do_train",
            "--do_eval", "--do_predict", "--load_best_model_at_end")  # fmt: skip
    finished = train(tiny_bert, tiny_data, folder, *more, json_name="zero2_fp32", ranks=2)
    assert "lora" in finished.stdout and "1,024" in finished.stdout
    settings.unlink()  # its content is recorded
    values = results(folder)
    assert (values["adapter_parameters"], values["head_parameters"], values["tuned_parameters"]) == (4 * 2 * 4 * 32, 66, 0)
    assert (values["method"], len(logged(folder))) == ("lora", values["train_steps"])
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "backbone.json", "tokenizer.json", "predict_results_test.tsv"}
    assert not [name for name in names if "partial" in name]
    scores = evaluated(folder, tmp_path / "scores.json")
    assert scores == pytest.approx({name: values[name] for name in scores}, rel=1e-6)
    finished = python("launch/predict.py", str(folder), "--output_dir", str(tmp_path))
    assert finished.returncode == 0, finished.output
    assert (tmp_path / "predict_results_test.tsv").read_text() == (folder / "predict_results_test.tsv").read_text()

    rows = [json.loads(line) for line in (tiny_data / "validation.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with quiet_peft():
        model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2), folder)
    inputs = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    labels = torch.tensor([row["label"] for row in rows])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(values["eval_loss"], rel=1e-5)
    assert (logits.argmax(-1) == labels).float().mean().item() == pytest.approx(values["eval_accuracy"])


def test_vera_at_zero_3_in_bf16_keeps_its_projections(tiny_bert, tiny_data, tmp_path):
    folder = tmp_path / "run"
    more = ("--method", "vera", "--method_config", '{"r": 8}', "--learning_rate", "1e-1", "--gradient_checkpointing")
    train(tiny_bert, tiny_data, folder, *more, json_name="zero3", ranks=2)
    for place in (folder, next(folder.glob("checkpoint-*"))):
        assert {name: load_file(place / "adapter_model.safetensors")[f"base_model.{name}"].shape for name in ("vera_A", "vera_B")} == {
            "vera_A": (8, 32), "vera_B": (32, 8),
        }  # fmt: skip
    values = results(folder)
    assert evaluated(folder, tmp_path / "scores.json") == pytest.approx({name: values[name] for name in ("eval_accuracy", "eval_loss")})


def test_wrong_settings_are_one_paragraph_before_anything_starts(tiny_bert, tiny_data, tmp_path):
    flags = (
        "--task_name",
        "sst2",
        "--data_dir",
        str(tiny_data),
        "--model_name_or_path",
        str(tiny_bert),
        "--output_dir",
        str(tmp_path / "run"),
    )
    finished = python("launch/train.py", *flags, "--method", "lora", "--method_config", '{"rank": 8}')
    assert finished.returncode == 2
    assert "method_config has rank; the settings of lora are" in finished.stderr, finished.output
    assert "Traceback" not in finished.stderr and not (tmp_path / "run").exists()
