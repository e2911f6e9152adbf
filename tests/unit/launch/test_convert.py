"""launch/convert.py in this process: what it writes, prints and refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import adakron
from adakron import adapter_folder, run_folder
from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.launcher import World, read_world
from launch import convert, evaluate
from tests.helpers import tiny
from tests.helpers.architectures import tiny_model
from tests.helpers.published import assert_same, save_base, soup, stored

HOMES = [f"bert.encoder.layer.{layer}.output" for layer in range(2)]
MODULES = {"MoA_A1": (32, 2, 1), "MoA_A2": (32, 4, 1), "MoA_B": (8, 32, 1)}
ADAMIX = {"MoA_A": (32, 8, 3), "MoA_B": (8, 32, 1)}


def convert_main(*arguments: str | Path) -> None:
    convert.main([str(argument) for argument in arguments], read_world({}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A backbone with its tokenizer."""
    return tiny.save_tiny_bert(tmp_path / "base")


def checkpoint(folder: Path, modules: dict[str, tuple[int, int, int]] = MODULES) -> Path:
    file = folder / "pytorch_model_expert_soup.bin"
    torch.save(
        soup(HOMES, modules, random_scores=True) | {"classifier.weight": torch.randn(2, 32), "classifier.bias": torch.randn(2)}, file
    )
    return file


def test_import_and_back(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint(tmp_path)
    convert_main("import", file, "--model_name_or_path", base, "--output_dir", tmp_path / "out", "--label_names", "bad, good")
    assert "written by AdaKron's GLUE code: adakron with bottleneck_dim 8 in 2 layers" in capsys.readouterr().out
    saved = adapter_folder.read_adapter_config(tmp_path / "out")
    assert saved.base_model == str(base) and saved.model_options["id2label"] == {0: "bad", 1: "good"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    convert_main("export", tmp_path / "out", "--output_file", tmp_path / "new" / "file.bin")
    assert_same(stored(tmp_path / "new" / "file.bin"), stored(file))


def test_an_imported_task_is_scored_like_a_run(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_main("import", checkpoint(tmp_path), "--model_name_or_path", base, "--output_dir", tmp_path / "out", "--task_name", "sst2")
    assert adapter_folder.read_adapter_config(tmp_path / "out").model_options["id2label"] == {0: "negative", 1: "positive"}
    data = tiny.write_classification(tmp_path / "data")
    capsys.readouterr()
    evaluate.main([str(tmp_path / "out"), "--data_dir", str(data)], read_world({}))
    scores = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines())

    model = adakron.load_adapter(AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "out")
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    tokens = AutoTokenizer.from_pretrained(base)([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        right = model(**tokens).logits.argmax(-1) == torch.tensor([row["label"] for row in rows])
    assert float(scores["eval_accuracy"]) == pytest.approx(right.double().mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_name", "mnli"], "task_name is mnli, whose head has 3 outputs, and the file's has 2; name another task"),
        (["--task_name", "stsb"], "whose head has 1 outputs"),
        (["--task_name", "rte", "--label_names", "yes,no"], "task rte names its classes itself; drop --label_names"),
    ],
)
def test_a_task_that_does_not_fit(tmp_path: Path, base: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_main("import", checkpoint(tmp_path), "--model_name_or_path", base, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_base_is_recorded_by_its_whole_path(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert_main("import", checkpoint(tmp_path), "--model_name_or_path", "base", "--output_dir", "out")
    monkeypatch.chdir("/")
    convert_main("export", tmp_path / "out", "--output_file", tmp_path / "file")


def test_a_base_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = save_base(tmp_path / "bare", tiny_model("bert"))
    convert_main("import", checkpoint(tmp_path), "--model_name_or_path", bare, "--output_dir", tmp_path / "out")
    assert "the backbone has no tokenizer" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_merge_an_imported_mixture(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_main("import", checkpoint(tmp_path, ADAMIX), "--model_name_or_path", base, "--output_dir", tmp_path / "mixture")
    convert_main("merge", tmp_path / "mixture", "--output_dir", tmp_path / "merged")
    assert "adamix with bottleneck_dim 8, 3 experts in down averaged into one expert" in capsys.readouterr().out
    assert adapter_folder.read_adapter_config(tmp_path / "merged").adapter.num_experts == 1
    assert sorted(os.listdir(tmp_path / "merged")) == sorted(os.listdir(tmp_path / "mixture"))
    with pytest.raises(ConfigError, match="nothing to merge"):
        convert_main("merge", tmp_path / "merged", "--output_dir", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("inside_a_run", [False, True])
def test_merge_keeps_the_run(tmp_path: Path, base: Path, inside_a_run: bool) -> None:
    run, adapter = tmp_path / "run", AdapterConfig(method="adamix", bottleneck_dim=8, num_experts=3, expert_scores="random")
    source = run / "checkpoint-4" if inside_a_run else run
    convert_main("import", checkpoint(tmp_path, ADAMIX), "--model_name_or_path", base, "--output_dir", source)
    config = RunConfig(
        model=ModelConfig(model_name_or_path=str(base)),
        adapter=adapter.resolved(),
        data=DataConfig(),
        training=TrainingConfig(merge_experts=True),
        deepspeed="x",
    )
    run_folder.write_json(run / run_folder.RUN_FILE, {"config": config.to_dict(), "precision": "fp32", "command": ["a"]})
    run_folder.write_json(source / run_folder.STATE_FILE, {})
    convert_main("merge", source, "--output_dir", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / run_folder.RUN_FILE).read_text())
    merged = RunConfig.from_dict(record["config"])
    assert merged.adapter == adapter_folder.read_adapter_config(tmp_path / "merged").adapter
    assert (merged.adapter.num_experts, merged.training.merge_experts, merged.model) == (1, False, config.model)
    assert record["merged_from"] == str(source) and record["precision"] == "fp32"
    assert not (tmp_path / "merged" / run_folder.STATE_FILE).exists()


def test_nothing_is_overwritten(tmp_path: Path, base: Path) -> None:
    file = checkpoint(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    for command in (["import", file, "--model_name_or_path", base], ["merge", tmp_path]):
        with pytest.raises(ConfigError, match="is not empty, and nothing is overwritten; name another folder"):
            convert_main(*command, "--output_dir", taken)
        with pytest.raises(ConfigError, match="is a file"):
            convert_main(*command, "--output_dir", taken / "mine")
    with pytest.raises(ConfigError, match="exists; name another file, or delete it"):
        convert_main("export", tmp_path, "--output_file", taken / "mine")
    assert os.listdir(taken) == ["mine"] and (taken / "mine").read_text() == "mine"


def test_a_refused_file_leaves_no_folder(tmp_path: Path, base: Path) -> None:
    file = checkpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read"):
        convert_main("import", file, "--model_name_or_path", base, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument is ''; it must be import, export, merge"),
        (["impart", "x"], "the first argument is 'impart'"),
        (["import", "x"], "the following arguments are required: --model_name_or_path, --output_dir; --help lists every flag"),
        (["import", "x", "--model_name_or_path", "y", "--output_dirs", "z"], "required: --output_dir"),
        (["export", "x", "--output_file", "y", "--form", "z"], r"unknown flag --form; did you mean --format\?"),
        (["export", "x", "--output_file", "y", "--format", "z"], "argument --format: invalid choice: 'z'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_main(*arguments)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    convert_main("--help")
    assert "launch/convert.py merge FOLDER --output_dir OUT" in capsys.readouterr().out
    for command in convert.COMMANDS:
        with pytest.raises(SystemExit):
            convert_main(command, "--help")
        assert f"convert.py {command}" in capsys.readouterr().out


def test_it_runs_in_one_process() -> None:
    world = World(rank=0, world_size=2, local_rank=0, local_world_size=2)
    with pytest.raises(ConfigError, match="runs in one process, and a launcher started 2; start it with python"):
        convert.main(["merge"], world)
