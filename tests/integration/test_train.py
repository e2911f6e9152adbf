"""launch/train.py, evaluate.py and predict.py as users start them."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adakron.config import AdapterConfig
from adakron.manifest import MANIFEST_FILE
from adakron.run_lock import check_unlocked
from adakron.store import CheckpointStore
from tests.helpers import tiny
from tests.helpers.launch import BIN, ROOT, Finished, deepspeed, free_port, logged, python, results, run
from tests.helpers.saved_runs import write_run

pytestmark = pytest.mark.launcher

STEPS = 4  # 50 examples in global batches of 16


def arguments(model: Path, data: Path, folder: Path, *more: str) -> list[str]:
    method = more[more.index("--method") + 1] if "--method" in more else "adakron"
    width = () if "bottleneck_dim" in AdapterConfig(method=method).idle else ("--bottleneck_dim", "8")
    return [
        "--model_name_or_path", str(model), "--task_name", "sst2", "--data_dir", str(data), "--output_dir", str(folder),
        "--num_train_epochs", "1", "--logging_steps", "1", *width, *more,
    ]  # fmt: skip


def train(model: Path, data: Path, folder: Path, *more: str, json_name: str = "zero2", ranks: int = 1) -> Finished:
    flags = arguments(model, data, folder, *more)
    finished = deepspeed("launch/train.py", "--deepspeed", f"ds_configs/{json_name}.json", *flags, ranks=ranks)
    assert finished.returncode == 0, finished.output
    return finished


def fingerprint(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_data: Path) -> tuple[Path, Finished]:
    """A run of 2 processes, ZeRO-2, bf16, with accumulation, evaluation, prediction and checkpoints."""
    folder = tmp_path_factory.mktemp("out") / "run"
    finished = train(
        tiny_bert, tiny_data, folder, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2",
        "--num_train_epochs", "3", "--do_train", "--do_eval", "--do_predict", "--save_total_limit", "1", "--learning_rate", "1e-2",
        "--load_best_model_at_end", ranks=2,
    )  # fmt: skip
    return folder, finished


def test_a_run_leaves_what_the_readme_lists(finished_run):
    folder, _ = finished_run
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "run.json", "deepspeed.json",
        "trainer_state.json", "train_results.json", "eval_results.json", "all_results.json", "metrics.jsonl", "tensorboard",
        "predict_results_test.tsv",
    }  # fmt: skip
    assert not [name for name in names if "partial" in name]


def test_all_results_are_flat_numbers(finished_run):
    values = results(finished_run[0])
    assert all(not isinstance(value, dict | list) for value in values.values())
    assert values["adapter_parameters"] == 2 * (33 * (4 + 2) + 9 * 32)
    assert values["head_parameters"] == 2 * 33
    assert values["train_steps"] == 3 * STEPS
    assert values["train_samples"] == 150
    for name in ("eval_accuracy", "eval_loss", "train_loss", "train_samples_per_second", "train_tokens_per_second", "peak_memory_mib"):
        assert values[name] >= 0.0


def test_only_adapters_and_head_are_saved(finished_run):
    tensors = load_file(finished_run[0] / "adapter_model.safetensors")
    assert {name for name in tensors if ".adakron_adapter." not in name} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    assert sum(tensor.size for tensor in tensors.values()) == 2 * (33 * 6 + 9 * 32) + 66
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}


def test_the_resolved_configuration_is_recorded(finished_run):
    folder, _ = finished_run
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["training"]["gradient_accumulation_steps"] == 2
    assert record["precision"] == "bf16"
    assert record["packages"]["torch"].startswith("2.")
    resolved = json.loads((folder / "deepspeed.json").read_text())
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"]) == (16, 4)


def test_tensorboard_holds_every_scalar_by_global_step(finished_run):
    events = EventAccumulator(str(finished_run[0] / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "train/loss", "train/learning_rate", "train/grad_norm", "train/loss_scale", "train/samples_per_second",
        "train/tokens_per_second", "train/peak_memory_mib", "eval/accuracy", "eval/loss",
    }  # fmt: skip
    loss = events.Scalars("train/loss")
    assert [event.step for event in loss] == list(range(1, 3 * STEPS + 1))
    assert [event.value for event in loss] == pytest.approx(logged(finished_run[0]), rel=1e-6)
    assert [event.step for event in events.Scalars("eval/accuracy")] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_the_best_adapter_is_kept_and_its_score_reported(finished_run):
    folder, _ = finished_run
    state = json.loads((folder / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry}
    assert len(evaluated) == 3
    assert state["best_metric"] == max(evaluated.values()) == results(folder)["eval_accuracy"]
    kept = {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}
    assert kept == {state["best_step"], 3 * STEPS}
    store = CheckpointStore(folder)
    newest = store.newest_good()
    assert newest.rejected == () and newest.checkpoint == store.latest == store.checkpoints()[-1]
    manifest = json.loads((store.checkpoints()[-1].path / MANIFEST_FILE).read_text())
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "trainer_state.json"} <= set(manifest["files"])
    check_unlocked(folder)


def test_the_run_ends_with_a_table_that_says_what_to_type(finished_run):
    folder, finished = finished_run
    for text in ("sst2 (adakron", "eval_accuracy", "adapter parameters", "samples/s", "tokens/s", "peak memory", "wall time"):
        assert text in finished.stdout
    assert f"python launch/evaluate.py {folder}" in finished.stdout


def test_evaluate_gives_the_identical_metrics_in_one_process(finished_run, tmp_path):
    folder, _ = finished_run
    finished = python("launch/evaluate.py", str(folder), "--output_file", str(tmp_path / "scores.json"))
    assert finished.returncode == 0, finished.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    expected = results(folder)
    assert scores == {name: expected[name] for name in ("eval_accuracy", "eval_loss")}


def test_predict_repeats_the_runs_predictions_and_takes_single_texts(finished_run, tmp_path):
    folder, _ = finished_run
    finished = python("launch/predict.py", str(folder), "--output_dir", str(tmp_path))
    assert finished.returncode == 0, finished.output
    assert (tmp_path / "predict_results_test.tsv").read_text() == (folder / "predict_results_test.tsv").read_text()
    assert len((tmp_path / "predict_results_test.tsv").read_text().splitlines()) == 1 + 5
    finished = python("launch/predict.py", str(folder), "--text", "good film", "--text", "bad plot")
    assert finished.returncode == 0, finished.output
    assert [line.split("\t")[1] for line in finished.stdout.splitlines() if "\t" in line] == ["good film", "bad plot"]


def test_predict_does_not_overwrite(finished_run):
    folder, _ = finished_run
    before = fingerprint(folder)
    finished = python("launch/predict.py", str(folder))
    assert finished.returncode == 2, finished.output
    assert "predict_results_test.tsv exists" in finished.stderr
    assert fingerprint(folder) == before


def test_a_second_run_into_the_same_folder_changes_nothing(finished_run, tiny_bert, tiny_data):
    folder, _ = finished_run
    before = fingerprint(folder)
    flags = arguments(tiny_bert, tiny_data, folder)
    finished = deepspeed("launch/train.py", "--deepspeed", "ds_configs/zero2.json", *flags, ranks=2)
    assert finished.returncode != 0
    assert finished.stderr.count("already holds a run") == 1, finished.output
    assert "Traceback" not in finished.stderr
    assert fingerprint(folder) == before


def test_one_and_two_processes_give_the_same_loss_curve(tiny_bert, tiny_data, tmp_path):
    train(tiny_bert, tiny_data, tmp_path / "one", "--per_device_train_batch_size", "16", "--unpad", "no", json_name="zero2_fp32")
    split = ("--per_device_train_batch_size", "3", "--global_batch_size", "16")  # three passes of three or two examples
    train(tiny_bert, tiny_data, tmp_path / "two", *split, json_name="zero2_fp32", ranks=2)
    for name in ("train/loss", "train/grad_norm"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-5), name
    assert results(tmp_path / "two")["eval_loss"] == pytest.approx(results(tmp_path / "one")["eval_loss"], rel=1e-5)


def test_torchrun_starts_it_too(tiny_bert, tiny_data, tmp_path):
    flags = ["--deepspeed", "ds_configs/zero2.json", *arguments(tiny_bert, tiny_data, tmp_path / "run", "--method", "head")]
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), "launch/train.py", *flags]
    finished = run(command)
    assert finished.returncode == 0, finished.output
    assert results(tmp_path / "run")["adapter_parameters"] == 0


def test_a_bad_flag_is_one_line_from_all_ranks_together(tmp_path):
    finished = deepspeed("launch/train.py", "--bottleneck_dim", "50", "--output_dir", str(tmp_path / "run"), ranks=2)
    assert finished.returncode != 0
    assert finished.stderr.count("must be divisible by kron_factor") == 1, finished.output
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_programs_are_not_hidden_by_their_own_names():
    # launch/evaluate.py stands beside launch/train.py, and python puts a script's folder first on the path.
    finished = python("launch/train.py", "--help", cwd=ROOT)
    assert finished.returncode == 0, finished.output
    assert "--bottleneck_dim" in finished.stdout


def test_own_data_trained_from_relative_files_predicts_from_anywhere(tiny_bert, tmp_path):
    data = tmp_path / "own"
    data.mkdir()
    rows = ["review,stars", *(f"the film was {word},{label}" for word, label in [("good", "high"), ("bad", "low")] * 10)]
    (data / "reviews.csv").write_text("\n".join(rows) + "\n")
    flags = ["--task_name", "text", "--train_file", "reviews.csv", "--validation_file", "reviews.csv", "--label_column", "stars"]
    model = [
        "--model_name_or_path",
        str(tiny_bert),
        "--output_dir",
        "run",
        "--max_steps",
        "40",
        "--learning_rate",
        "1e-2",
        "--method",
        "full",
    ]
    finished = python(str(ROOT / "launch/train.py"), *flags, *model, cwd=data)
    assert finished.returncode == 0, finished.output
    assert results(data / "run")["eval_accuracy"] == 1.0
    (data / "reviews.csv").rename(data / "moved.csv")
    texts = ["--text", "the film was good", "--text", "the film was bad"]
    finished = python("launch/predict.py", str(data / "run"), *texts)
    assert [line.split(" ")[0] for line in finished.stdout.splitlines()] == ["high", "low"], finished.output
    finished = python("launch/evaluate.py", str(data / "run"), "--validation_file", str(data / "moved.csv"))
    assert "eval_accuracy = 1.000000" in finished.stdout, finished.output
    finished = python("launch/evaluate.py", str(data / "run"))
    assert finished.returncode == 2, finished.output
    assert "reviews.csv" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_two_runs_predict_together(finished_run, tiny_bert, tmp_path):
    """Each row by the run it names, on two processes as on one: a trained run beside one of three classes."""
    folder, _ = finished_run
    classes = {"num_labels": 3, "id2label": {"0": "bad", "1": "fair", "2": "good"}, "problem_type": "single_label_classification"}
    other = write_run(
        tmp_path / "other", tiny_bert, seed=1, precision="bf16", options=classes, method="madakron", task_name="text",
        text_column="sentence", label_column="label",
    )  # fmt: skip
    texts = tiny.sentences(5, seed=3)
    names = ["run", "other", "other", "run", "other"]
    rows = [{"sentence": text, "adapter": name} for text, name in zip(texts, names, strict=True)]
    file = tiny.write_jsonl(tmp_path / "mixed.jsonl", rows)
    mixed = [str(folder), "--adapter", f"other={other}", "--test_file", str(file), "--adapter_column", "adapter"]
    program = ["launch/predict.py", *mixed, "--per_device_eval_batch_size", "2", "--output_dir"]
    finished = python(*program, str(tmp_path / "one"))
    assert finished.returncode == 0, finished.output
    finished = run([str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), *program, str(tmp_path / "two")])
    assert finished.returncode == 0, finished.output
    table = [line.split("\t") for line in (tmp_path / "one" / "predict_results_test.tsv").read_text().splitlines()]
    assert table[0] == ["index", "adapter", "prediction"] and [line[1] for line in table[1:]] == names
    assert (tmp_path / "two" / "predict_results_test.tsv").read_text() == (tmp_path / "one" / "predict_results_test.tsv").read_text()
    assert all(line[2] in (("negative", "positive") if line[1] == "run" else ("bad", "fair", "good")) for line in table[1:])
    finished = python("launch/predict.py", str(other), "--allow_other_backbone", "--text", texts[0])
    assert finished.returncode == 0 and "another backbone" not in finished.output
    moved = tiny.save_tiny_bert(tmp_path / "moved", seed=1)
    finished = python("launch/evaluate.py", str(folder), "--model_name_or_path", str(moved))
    assert finished.returncode == 2 and "was trained on another backbone" in finished.stderr, finished.output
    finished = python("launch/evaluate.py", str(folder), "--model_name_or_path", str(moved), "--allow_other_backbone")
    assert finished.returncode == 0 and "sampled weights differ" in finished.output, finished.output
