"""launch/bench.py on a tiny model: every contender takes its turns, and the table says what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.contenders import CONTENDERS
from tests.helpers.launch import Finished, python

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(400)]


def bench(tiny_bert: Path, tiny_data: Path, *flags: str, **options: Any) -> Finished:
    data = ["--task_name", "sst2", "--data_dir", str(tiny_data), "--model_name_or_path", str(tiny_bert), "--precision", "fp32"]
    return python("launch/bench.py", *data, "--batch", "4", "--max_seq_length", "32", "--threads", "1", *flags, timeout=380, **options)


def test_every_contender_takes_its_turns(tiny_bert: Path, tiny_data: Path, tmp_path: Path):
    result = tmp_path / "bench.json"
    finished = bench(tiny_bert, tiny_data, "--examples", "16", "--rounds", "2", "--json", str(result))
    assert finished.returncode == 0, finished.output
    content = json.loads(result.read_text())
    assert content["contenders"].keys() == CONTENDERS.keys()
    for name, one in content["contenders"].items():
        assert len(one["seconds"]) == 2 and min(one["seconds"]) > 0, name
        assert one["peak_memory"] > 2**20, name
    assert content["useful_tokens_per_round"] > 0 and content["flop_per_round"] > 0
    rows = [line for line in finished.stdout.splitlines() if line.startswith("| ") and "samples/s" not in line]
    assert len(rows) == len(CONTENDERS)
    (ours,) = [row for row in rows if row.startswith("| AdaKron, this engine |")]
    assert ours.endswith("| 1.00 |")


def test_a_contender_that_fails_ends_it_with_a_remedy(tiny_bert: Path, tiny_data: Path):
    flags = ["--examples", "8", "--rounds", "1", "--contenders", "adakron"]
    finished = bench(tiny_bert, tiny_data, *flags, env={"DS_ACCELERATOR": "abacus"})
    assert finished.returncode == 2, finished.output
    assert "AdaKron, this engine ended with code" in finished.stderr and "leave it out with --contenders" in finished.stderr


@pytest.mark.parametrize(("flag", "said"), [("--batch", "--batch is 0; it must be at least 1"), ("--contender", "unknown flag")])
def test_bad_flags_are_one_error(flag: str, said: str):
    finished = python("launch/bench.py", flag, "0", timeout=60)
    assert (finished.returncode, said in finished.stderr) == (2, True), finished.output
