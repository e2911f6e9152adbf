"""Run, adapter and model folders that were tampered with, and hostile checkpoints: refused in one paragraph, or accepted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from adakron import backbone, run_folder
from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.tasks import create_task
from launch import attachment, convert, evaluate, predict, train
from tests.helpers.fuzzing import Case, cases, generator, pick, run_case
from tests.helpers.hostile import folders, weights
from tests.helpers.published import soup
from tests.helpers.saved_runs import write_run

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_bert) -> dict[str, Path]:
    """Finished runs: one of the default method, a mixture, one on own data, one of a method of PEFT's."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    found = {
        "plain": write_run(folder / "plain", tiny_bert, seed=1, task_name="sst2"),
        "mixture": write_run(folder / "mixture", tiny_bert, seed=2, task_name="sst2", method="madakron"),
        "text": write_run(folder / "text", tiny_bert, seed=3, task_name="text", text_column="sentence", options=options),
        "lora": folder / "lora",
    }
    config = RunConfig(
        model=ModelConfig(model_name_or_path=str(tiny_bert)), adapter=AdapterConfig(method="lora"), data=DataConfig(task_name="sst2"),
        training=TrainingConfig(), deepspeed="",
    )  # fmt: skip
    task = create_task(config.data, config.training)
    base = backbone.load_backbone(config.model, auto_class=task.auto_class, options=task.model_options(), seed=0)
    attached = attachment.attach(base, config.adapter, 0, torch.float32)
    trained = {name: value.detach() for name, value in attached.model.named_parameters() if value.requires_grad}
    attached.folder.write(found["lora"], trained, auto_class=task.auto_class, model_options=task.model_options())
    run_folder.write_json(found["lora"] / run_folder.RUN_FILE, {"config": config.to_dict(), "precision": "fp32"})
    return found


def programs(rng, folder: Path, other: Path, data: Path, home: Path) -> Case:
    """A program that opens the folder."""
    out = home / "out"
    named = ("hostile", "run", "adapter", "model", "tokenizer", "data", "file", "split", "task", "column", "batch_size")
    choice = pick(rng, ("evaluate", "evaluate", "texts", "file", "mixed", "merge", "export"))
    if choice == "evaluate":
        return Case(evaluate, [str(folder), "--data_dir", str(data)], named)
    if choice == "texts":
        return Case(predict, [str(folder), "--text", "the film is good"], named)
    if choice == "file":
        return Case(predict, [str(folder), "--test_file", str(data / "test.jsonl"), "--output_dir", str(out)], named)
    if choice == "mixed":
        return Case(predict, [str(other), "--adapter", f"a={folder}", "--text", "good", "--adapter_name", "a"], named)
    if choice == "merge":
        return Case(convert, ["merge", str(folder), "--output_dir", str(out)], (*named, "nothing to merge"), written=(out,))
    return Case(convert, ["export", str(folder), "--output_file", str(out / "x.bin")], named, written=(out,))


@pytest.mark.parametrize("kind", ["plain", "mixture", "text", "lora"])
@cases(40)
def test_run_folders(index, kind, runs, tiny_data, tmp_path, monkeypatch, offline):
    rng = generator(f"folder {kind}", index)
    home, folder = tmp_path / "home", tmp_path / "hostile"
    home.mkdir()
    shutil.copytree(runs[kind], folder)
    names = ("adapter_config.json", "run.json", "adapter_model.safetensors", *(("backbone.json",) if kind == "lora" else ()))
    what = folders.tamper(rng, folder, names)
    case = programs(rng, folder, runs["plain"], tiny_data, home)
    case.what = what
    before = sorted(path.name for path in folder.iterdir())
    run_case(case, home, monkeypatch)
    assert not list(tmp_path.rglob("owned"))
    assert sorted(path.name for path in folder.iterdir()) == before


@cases(60)
def test_model_folders(index, tiny_bert, tiny_data, tmp_path, monkeypatch, offline):
    rng = generator("model", index)
    home, folder = tmp_path / "home", tmp_path / "hostile"
    home.mkdir()
    shutil.copytree(tiny_bert, folder)
    what = folders.tamper(rng, folder, ("config.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))
    arguments = ["--model_name_or_path", str(folder), "--task_name", "sst2", "--data_dir", str(tiny_data)]
    run_case(Case(train, arguments, ("hostile", "model", "tokenizer", "adapters"), what), home, monkeypatch)
    assert not list(tmp_path.rglob("owned"))


@cases(60)
def test_published_checkpoints(index, tiny_bert, tmp_path, monkeypatch, offline):
    rng = generator("checkpoint", index)
    home, file = tmp_path / "home", tmp_path / "hostile.bin"
    home.mkdir()
    homes = [f"bert.encoder.layer.{layer}.output" for layer in range(2)]
    good = soup(homes, {"MoA_A1": (32, 2, 1), "MoA_A2": (32, 4, 1), "MoA_B": (8, 32, 1)})
    good |= {"classifier.weight": torch.randn(2, 32), "classifier.bias": torch.randn(2)}
    what = weights.write_checkpoint(rng, file, good)
    arguments = ["import", str(file), "--model_name_or_path", str(tiny_bert), "--output_dir", str(home / "out")]
    run_case(Case(convert, arguments, ("hostile.bin",), what, written=(home / "out",)), home, monkeypatch)
    assert not list(tmp_path.rglob("owned"))


CODE = "open({!r}, 'w').close()\nfrom transformers import BertConfig, BertModel, BertForSequenceClassification\n"


def test_code_of_a_model_folder_does_not_run_unless_asked(tiny_bert, tiny_data, tmp_path, monkeypatch, offline):
    folder, home = tmp_path / "hostile", tmp_path / "home"
    home.mkdir()
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "mine.MyConfig", "AutoModelForSequenceClassification": "mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "mine"}))
    (folder / "mine.py").write_text(
        CODE.format(str(tmp_path / "owned")) + "class MyConfig(BertConfig):\n    model_type = 'mine'\n"
        "class MyModel(BertForSequenceClassification):\n    config_class = MyConfig\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = ["--model_name_or_path", str(folder), "--task_name", "sst2", "--data_dir", str(tiny_data)]
    outcome = run_case(Case(train, arguments, ("hostile",)), home, monkeypatch)
    assert not outcome.accepted and not (tmp_path / "owned").exists()
    # A saved run cannot ask on the user's behalf, either.
    run = write_run(tmp_path / "run", tiny_bert, seed=1, task_name="sst2")
    record = json.loads((run / "run.json").read_text())
    record["config"]["model"] |= {"trust_remote_code": True, "model_name_or_path": str(folder)}
    (run / "run.json").write_text(json.dumps(record))
    outcome = run_case(Case(evaluate, [str(run), "--data_dir", str(tiny_data)], ("--trust_remote_code",)), home, monkeypatch)
    assert not outcome.accepted and not (tmp_path / "owned").exists()


def test_every_kind_of_folder_is_accepted_untouched(runs, tiny_data, tmp_path, monkeypatch, offline):
    for folder in (runs["plain"], runs["mixture"], runs["lora"]):
        assert run_case(Case(evaluate, [str(folder), "--data_dir", str(tiny_data)], ()), tmp_path, monkeypatch).accepted
