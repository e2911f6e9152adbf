"""What no import shows: the layers hold and their contracts bite, the recipes and JSON files are valid, pins fit ranges."""

import configparser
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adakron.config import AdapterConfig, DataConfig, ModelConfig, TrainingConfig
from adakron.engine.ds_config import RunValues, read_json, resolve

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").rglob("*.yaml"))
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
# learning rate, epochs, longest input, whether the best epoch is chosen: the published RoBERTa-large scripts.
PUBLISHED = {
    "cola": (3e-4, 80, 128, False),
    "stsb": (3e-4, 80, 128, False),
    "mrpc": (3e-4, 60, 128, True),
    "rte": (5e-4, 60, 256, True),
    "sst2": (3e-4, 20, 128, True),
    "qnli": (3e-4, 20, 128, True),
    "mnli": (3e-4, 20, 128, True),
    "qqp": (5e-4, 60, 128, True),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the checkout in a folder, in a process of its own: it edits sys.path."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-P", "-c", code, "--no-cache", "--no-logo", "--config", str(folder / "setup.cfg")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def settings_of(recipe: Path) -> dict[str, Any]:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_imports_follow_the_layers() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("nn/intruder.py", "import transformers", "nn is torch only"),
        ("engine/intruder.py", "import adakron.nn", "the engine knows no model, adapter, task or batch"),
        ("data/intruder.py", "import deepspeed", "only the engine imports deepspeed"),
        ("data/intruder.py", "import argparse", "only launch parses arguments"),
        ("data/intruder.py", "import launch", "the library never imports the entry points"),
        ("log.py", "import adakron.distributed", "imports go down the layers only"),
        ("utils.py", "", "imports go down the layers only"),
    ],
)
def test_a_forbidden_import_is_reported(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for package in ("adakron", "launch"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    target = tmp_path / "adakron" / module
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    target.write_text(f"{before}\n{line}\n", encoding="utf-8")
    result = lint(tmp_path)
    assert result.returncode != 0, result.stdout
    broken = [row for row in result.stdout.splitlines() if row.startswith(contract) and "BROKEN" in row]
    assert broken, result.stdout + result.stderr


def test_every_published_setting_has_a_recipe() -> None:
    names = {recipe.stem for recipe in RECIPES}
    assert {f"{model}-{task}" for model in ("roberta-large", "bert-base") for task in GLUE} <= names


@pytest.mark.parametrize(
    ("data", "task", "epochs", "warmup", "decay", "smoothing", "experts"),
    [
        ("e2e", "e2e_nlg", 20, 2000, 0.01, 0.1, 8),
        ("webnlg", "webnlg_2017", 25, 2500, 0.01, 0.1, 4),
        ("dart", "dart", 20, 2000, 0.0, 0.0, 8),
    ],
)
def test_generation_recipes_are_the_published_settings(
    data: str, task: str, epochs: int, warmup: int, decay: float, smoothing: float, experts: int
) -> None:
    plain, mixture = (settings_of(ROOT / "launch" / "recipes" / "nlg" / f"{data}_{method}.yaml") for method in ("adakron", "madakron"))
    expected = {
        "task_name": task, "num_train_epochs": epochs, "warmup_steps": warmup, "weight_decay": decay, "label_smoothing": smoothing,
        "learning_rate": 2e-4, "per_device_train_batch_size": 8, "max_seq_length": 512, "bottleneck_dim": 8, "kron_factor": 4,
        "factor_order": "b_major", "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "lr_scheduler_type": "linear", "dropout": 0.0, "seed": 110,
    }  # fmt: skip
    assert plain.items() >= expected.items()
    assert mixture.items() >= expected.items()
    only_theirs = {"method": "madakron_partial", "num_experts": experts, "expert_scores": "random", "consistency_weight": 100.0}
    assert dict(mixture.items() - plain.items()) == only_theirs


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_holds_only_settings_and_is_valid(recipe: Path) -> None:
    content = settings_of(recipe)
    used: set[str] = set()
    for kind in (ModelConfig, AdapterConfig, DataConfig, TrainingConfig):
        known = {field.name: field for field in dataclasses.fields(kind)}
        own = {key: value for key, value in content.items() if key in known}
        built = kind(**own)
        # YAML reads 3e-4 as a string and true as a bool: the type must be what the field's default or annotation says.
        for key in own:
            assert isinstance(getattr(built, key), str) == ("str" in str(known[key].type) or "Literal" in str(known[key].type)), key
        used |= own.keys()
    assert content.keys() == used


@pytest.mark.parametrize("task", GLUE)
def test_roberta_large_recipes_are_the_published_scripts(task: str) -> None:
    content = settings_of(ROOT / "launch" / "recipes" / "glue" / f"roberta-large-{task}.yaml")
    rate, epochs, length, choose = PUBLISHED[task]
    expected = {
        "task_name": task, "model_name_or_path": "roberta-large", "bottleneck_dim": 16, "learning_rate": rate, "num_train_epochs": epochs,
        "max_seq_length": length, "per_device_train_batch_size": 64, "warmup_ratio": 0.06, "weight_decay": 0.1, "seed": 0,
    }  # fmt: skip
    assert {key: content[key] for key in expected} == expected
    assert content.get("load_best_model_at_end", False) is choose
    assert content.get("metric_for_best_model") == ("accuracy" if choose else None)


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 3])
def test_deepspeed_json_takes_everything_from_the_flags(file: Path, world_size: int) -> None:
    settings = resolve(read_json(str(file)), RunValues(micro_batch=4, accumulation=2, world_size=world_size, max_grad_norm=0.5))
    assert "auto" not in json.dumps(settings.config)
    assert settings.config["train_batch_size"] == 8 * world_size
    stage, _, precision = file.stem.removeprefix("zero").partition("_")
    # The flags decide the precision where something is offloaded.
    expected = precision if precision in ("fp32", "fp16") else "fp32" if precision else "bf16"
    assert (settings.stage, settings.precision) == (int(stage), expected)


def test_every_deepspeed_json_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    table = [name for row in rows for name in re.findall("`(.+?)`", row)]
    assert sorted(table) == sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))


def test_every_requirement_is_pinned_inside_its_range() -> None:
    pins = {}
    for row in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if row and not row.startswith("#"):
            name, version = row.split("==")
            pins[canonicalize_name(name)] = version
    parser = setup_cfg()
    wanted = parser["options"]["install_requires"].split("\n") + [
        row for extra in parser["options.extras_require"].values() for row in extra.split("\n")
    ]
    requirements = [Requirement(row) for row in wanted if row]
    assert set(parser["options.extras_require"]) == {"quickstart", "peft", "nlg", "plots", "test", "dev"}
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_pyproject_is_three_lines_of_build_system() -> None:
    rows = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3 and rows[0] == "[build-system]"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_train_runs_exactly_the_documented_command() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(["make", "-n", "train"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "deepspeed launch/train.py --deepspeed ds_configs/zero2.json"
