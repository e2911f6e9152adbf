"""launch/bench.py on a tiny model: every contender takes its turns, and the tables say what was measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.contenders import CONTENDERS
from launch.contenders.phases import PHASES
from launch.contenders.targets import SST2_FP32, TARGETS
from tests.helpers.launch import ROOT, Finished, python, run

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(620)]

SMALL = ("--batch", "4", "--max_seq_length", "32", "--threads", "1")


def bench(tiny_bert: Path, tiny_data: Path, *flags: str, **options: Any) -> Finished:
    data = ["--task_name", "sst2", "--data_dir", str(tiny_data), "--model_name_or_path", str(tiny_bert), "--precision", "fp32"]
    return python(str(ROOT / "launch" / "bench.py"), *data, *SMALL, *flags, timeout=600, **options)


def test_every_contender_takes_its_turns(tiny_bert: Path, tiny_data: Path, tmp_path: Path):
    result = tmp_path / "bench.json"
    flags = ["--examples", "16", "--rounds", "2", "--evaluation", "100", "--contenders", *CONTENDERS, "--json", str(result)]
    finished = bench(tiny_bert, tiny_data, *flags, cwd=tmp_path)  # from any folder
    assert finished.returncode == 0, finished.output
    content = json.loads(result.read_text())
    assert content["contenders"].keys() == CONTENDERS.keys()
    assert content["workload"]["evaluation_examples"] == 23  # as many as there are
    for name, one in content["contenders"].items():
        assert len(one["seconds"]) == len(one["evaluation_seconds"]) == 2, name
        assert min(*one["seconds"], *one["evaluation_seconds"]) > 0, name
        assert one["peak_memory"] > 2**20, name
        assert one["start_seconds"] > 0, name
        phases = one["phases_ms"]
        assert {"step", "data", "forward", "backward", "optimizer", "rest"} <= phases.keys() <= {"step", "rest", *PHASES}, name
        assert all(0 < phases[phase] < phases["step"] for phase in ("data", "forward", "backward", "optimizer")), (name, phases)
    assert content["useful_tokens_per_round"] > 0 and content["flop_per_round"] > 0
    assert finished.stdout.startswith("sst2, 16 examples, batch 4, fp32"), finished.output  # what libraries say is elsewhere
    speeds, phases, scores = (
        [line for line in part.splitlines() if line.startswith("| ") and "---" not in line][1:]
        for part in (f"| {part}" for part in finished.stdout.split("\n\n| ")[1:])
    )
    assert len(speeds) == len(phases) == len(scores) == len(CONTENDERS)
    for rows in (speeds, scores):
        (ours,) = [row for row in rows if row.startswith("| AdaKron, this engine |")]
        assert ours.endswith("| 1.00 |")
    assert "engine overhead over the plain loop with the same kernels: " in finished.stdout


def test_a_random_model_of_a_known_size(tiny_data: Path, tmp_path: Path):
    flags = ["--task_name", "sst2", "--data_dir", str(tiny_data), "--model_size", "minilm", "--contenders", "adakron"]
    finished = python("launch/bench.py", *flags, *SMALL, "--examples", "1000", "--rounds", "1", timeout=300)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.startswith("sst2, a random minilm, 50 examples, batch 4, bf16"), finished.output


def test_the_suite_measures_and_judges(tiny_data: Path, tmp_path: Path):
    shutil.copytree(tiny_data, tmp_path / "sst2")
    result = tmp_path / "suite.json"
    flags = ["--suite", "--data_root", str(tmp_path), "--cases", SST2_FP32, "--examples", "8", "--rounds", "1", "--json", str(result)]
    finished = python("launch/bench.py", *flags, *SMALL, timeout=300)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.startswith("# Benchmark\n") and f"## {SST2_FP32}" in finished.stdout, finished.output
    content = json.loads(result.read_text())
    assert content["cases"].keys() == {SST2_FP32} and len(content["targets"]) == len(TARGETS)
    assert finished.stdout.count("| not measured |") == len(TARGETS)  # none is about this case


def test_make_bench_says_where_data_are_missing(tmp_path: Path):
    # Under another make, this one would say which folder it leaves.
    finished = run(["make", "-n", "--no-print-directory", "bench", f"DATA_ROOT={tmp_path}/my data"])
    assert finished.stdout.splitlines()[-1] == f'python launch/bench.py --suite --data_root "{tmp_path}/my data"'
    finished = python("launch/bench.py", "--suite", "--data_root", str(tmp_path), timeout=60)
    assert (finished.returncode, "where there is no mrpc, sst2; the suite needs" in finished.stderr) == (2, True), finished.output


def test_a_contender_that_fails_ends_it_with_a_remedy(tiny_bert: Path, tiny_data: Path):
    flags = ["--examples", "8", "--rounds", "1", "--contenders", "adakron"]
    finished = bench(tiny_bert, tiny_data, *flags, env={"DS_ACCELERATOR": "abacus"})
    assert finished.returncode == 2, finished.output
    assert "AdaKron, this engine ended with code" in finished.stderr and "leave it out with --contenders" in finished.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--evaluation", "0"], "--evaluation is 0; it must be at least 1"),
        (["--contender", "0"], "unknown flag"),
        (["--model_size", "minilm", "--model_name_or_path", "x"], "both choose the backbone"),
        (["--suite", "--precision", "bf16"], "--precision does nothing with --suite"),
        (["--cases", SST2_FP32], "--cases does nothing without --suite"),
        (["--plot", "bars.pdf"], "must end in .png or .svg"),
    ],
)
def test_bad_flags_are_one_error(flags: list[str], said: str):
    finished = python("launch/bench.py", *flags, timeout=60)
    assert (finished.returncode, said in finished.stderr) == (2, True), finished.output
