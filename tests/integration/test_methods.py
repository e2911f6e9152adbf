"""Mixtures and relatives through the programs: trained, saved, evaluated again."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.helpers.launch import deepspeed, logged, python, results
from tests.integration.test_train import train

pytestmark = pytest.mark.launcher


def adapter_settings(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def evaluated(folder: Path, output: Path, *more: str) -> dict:
    finished = python("launch/evaluate.py", str(folder), "--output_file", str(output), *more)
    assert finished.returncode == 0, finished.output
    return json.loads(output.read_text())


def level_loss(folder: Path, output: Path, level: str) -> float:
    return evaluated(folder, output, "--inference_level", level)["eval_loss"]


def test_a_mixture_draws_the_same_experts_on_one_and_two_processes(tiny_bert, tiny_data, tmp_path):
    flags = ("--method", "adamix", "--num_experts", "3", "--consistency_weight", "1", "--init_std", "2", "--learning_rate", "1e-2")
    train(tiny_bert, tiny_data, tmp_path / "one", *flags, "--per_device_train_batch_size", "16", json_name="zero2_fp32")
    train(tiny_bert, tiny_data, tmp_path / "two", *flags, "--per_device_train_batch_size", "8", json_name="zero2_fp32", ranks=2)
    assert max(logged(tmp_path / "one", "train/consistency")) > 1e-6
    for name in ("train/loss", "train/consistency", "train/grad_norm"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4), name
    assert results(tmp_path / "two")["eval_loss"] == pytest.approx(results(tmp_path / "one")["eval_loss"], rel=1e-5)


def test_a_mixture_is_saved_with_its_experts_or_merged(tiny_bert, tiny_data, tmp_path):
    folder = tmp_path / "run"
    flags = ("--method", "adamix", "--expert_scores", "random", "--merge_experts", "--init_std", "0.3", "--learning_rate", "1e-2")
    train(tiny_bert, tiny_data, folder, *flags, json_name="zero3", ranks=2)
    checkpoint = next(folder.glob("checkpoint-*"))
    assert (adapter_settings(checkpoint)["num_experts"], adapter_settings(folder)["num_experts"]) == (4, 1)
    experts, merged = (load_file(place / "adapter_model.safetensors") for place in (checkpoint, folder))
    name = "base_model.model.bert.encoder.layer.0.output.dense.adakron_adapter.down"
    assert experts[f"{name}.weight"].shape == (4, 8, 32) and merged[f"{name}.weight"].shape == (8, 32)
    assert len({*experts[f"{name}.expert_scores"].tolist()}) == 4 and f"{name}.expert_scores" not in merged
    expected = results(folder)["eval_loss"]
    levels = {level: level_loss(checkpoint, tmp_path / f"level{level}.json", level) for level in ("0", "1", "3")}
    assert len({*levels.values()}) == 3 and levels["0"] == level_loss(checkpoint, tmp_path / "again.json", "0")
    finished = python("launch/evaluate.py", str(folder), "--inference_level", "0")
    assert finished.returncode == 2 and "the model has no mixture of experts" in finished.stderr, finished.output
    for place in (checkpoint, folder):  # the run's own evaluation averaged the experts in bf16
        assert evaluated(place, tmp_path / f"{place.name}.json")["eval_loss"] == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(("method", "json_name"), [("full", "zero3"), ("bitfit", "zero2"), ("houlsby", "zero1")])
def test_relatives_train_save_and_evaluate_again(method, json_name, tiny_bert, tiny_data, tmp_path):
    folder = tmp_path / "run"
    train(tiny_bert, tiny_data, folder, "--method", method, "--learning_rate", "1e-2", json_name=json_name, ranks=2)
    values = results(folder)
    assert evaluated(folder, tmp_path / "scores.json")["eval_loss"] == pytest.approx(values["eval_loss"], rel=1e-6)
    if method == "full":
        assert values["tuned_parameters"] == values["backbone_parameters"] and values["trainable_percent"] == 100.0
    elif method == "bitfit":
        assert 0 < values["tuned_parameters"] < 0.1 * values["backbone_parameters"] and values["adapter_parameters"] == 0
    else:
        assert values["adapter_parameters"] == 4 * (33 * 8 + 9 * 32)  # two places in each of two layers


def test_checkpointed_activations_change_no_number(tiny_bert, tiny_data, tmp_path):
    flags = ("--method", "madakron", "--consistency_weight", "1", "--init_std", "0.3", "--learning_rate", "1e-2")
    for name, more in (("kept", ()), ("again", ("--gradient_checkpointing",))):
        train(tiny_bert, tiny_data, tmp_path / name, *flags, *more, json_name="zero2_fp32")
    assert logged(tmp_path / "again") == pytest.approx(logged(tmp_path / "kept"), rel=1e-6)
    assert logged(tmp_path / "again", "train/grad_norm") == pytest.approx(logged(tmp_path / "kept", "train/grad_norm"), rel=1e-6)


def test_a_consistency_loss_that_would_be_zero_is_refused(tiny_bert, tiny_data, tmp_path):
    flags = ("--task_name", "sst2", "--data_dir", str(tiny_data), "--model_name_or_path", str(tiny_bert), "--consistency_weight", "1")
    finished = deepspeed("launch/train.py", *flags, "--output_dir", str(tmp_path / "run"))
    assert finished.returncode != 0
    assert "two passes of this model are equal" in finished.stderr, finished.output
    assert "Traceback" not in finished.stderr and not (tmp_path / "run").exists()
