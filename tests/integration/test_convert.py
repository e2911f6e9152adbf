"""A trained mixture merged, evaluated, exported and imported again."""

from pathlib import Path

import pytest

from adakron.adapter_folder import read_adapter_config
from adakron.errors import ConfigError
from adakron.launcher import read_world
from launch import convert
from tests.helpers.launch import deepspeed, python, results
from tests.helpers.published import stored

pytestmark = pytest.mark.launcher


def test_a_trained_mixture(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> None:
    run, merged, file = tmp_path / "run", tmp_path / "merged", tmp_path / "adapter.bin"
    finished = deepspeed(
        "launch/train.py", "--deepspeed", "ds_configs/zero2_fp32.json", "--model_name_or_path", str(tiny_bert), "--task_name", "sst2",
        "--data_dir", str(tiny_data), "--output_dir", str(run), "--num_train_epochs", "2", "--bottleneck_dim", "8", "--method", "madakron",
        "--num_experts", "3", "--learning_rate", "1e-2", "--init_std", "0.3",
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    world = read_world({})
    with pytest.raises(ConfigError, match=r"average them first .convert.py merge"):
        convert.main(["export", str(run), "--output_file", str(file)], world)

    done = python("launch/convert.py", "merge", str(run), "--output_dir", str(merged))
    assert done.returncode == 0 and f"launch/evaluate.py {merged}" in done.stdout, done.output
    scored = python("launch/evaluate.py", str(merged))
    assert scored.returncode == 0, scored.output
    scores = {name: float(value) for name, _, value in (line.partition(" = ") for line in scored.stdout.splitlines()) if value}
    assert scores.keys() == {"eval_accuracy", "eval_loss"}
    assert scores == pytest.approx({name: results(run)[name] for name in scores}, abs=2e-6)

    convert.main(["export", str(merged), "--output_file", str(file)], world)
    assert "bert.encoder.layer.1.output.ExpertSoup.MoA_A2.deepspeed_experts.0.weight" in stored(file)
    convert.main(["import", str(file), "--model_name_or_path", str(tiny_bert), "--output_dir", str(tmp_path / "again")], world)
    # The same backbone, before training, after it, and beside a published checkpoint.
    fingerprints = [read_adapter_config(folder).backbone for folder in (run, merged, tmp_path / "again")]
    assert fingerprints[0] is not None and fingerprints == [fingerprints[0]] * 3
