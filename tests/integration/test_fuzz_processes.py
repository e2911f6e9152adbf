"""The worst of the hostile input once more in processes of their own, whose memory and time are bounded from outside."""

import json
import os
import shutil

import pytest

from tests.helpers import launch
from tests.helpers.fuzzing import check_message
from tests.helpers.saved_runs import write_run

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["secret", "weights"])
def test_hostile_input_in_a_process(kind, tiny_bert, tiny_data, tmp_path):
    if kind == "secret":
        program, named = "launch/train.py", "unknown flag --hub_token"
        arguments = [
            "--hub_token",
            TOKEN,
            "--model_revision",
            f"https://me:{TOKEN}@example.org\x1b[2J",
            "--output_dir",
            str(tmp_path / "out"),
        ]
    else:
        run = write_run(tmp_path / "run", tiny_bert, seed=1, task_name="sst2")
        (run / "adapter_model.safetensors").unlink()
        os.mkfifo(run / "adapter_model.safetensors")
        program, arguments, named = "launch/evaluate.py", [str(run), "--data_dir", str(tiny_data)], "adapter_model.safetensors"
    finished = launch.python(program, *arguments, timeout=60)
    assert finished.returncode == 2, finished.output
    check_message(finished.stderr, finished.stderr[finished.stderr.index("error:") :], [named])
    assert TOKEN not in finished.output and not (tmp_path / "out").exists()


@pytest.mark.timeout(120)
def test_no_secret_reaches_a_run_folder(tiny_bert, tiny_data, tmp_path):
    folder = tmp_path / f"model-{TOKEN}"
    shutil.copytree(tiny_bert, folder)
    arguments = ["--model_name_or_path", str(folder), "--task_name", "sst2", "--data_dir", str(tiny_data), "--max_steps", "1"]
    finished = launch.python("launch/train.py", *arguments, "--output_dir", str(tmp_path / "out"), "--eval_strategy", "no", timeout=100)
    assert finished.returncode == 0, finished.output
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "model-***" in " ".join(record["command"])
    assert TOKEN not in json.dumps(record) and TOKEN not in finished.stderr
