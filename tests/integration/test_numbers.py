"""Numbers that go wrong, ranks that are lost, and the same bits twice: real processes, which no launcher cleans up after."""

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adakron.distributed import EXIT_LOST_RANK
from tests.helpers import tiny
from tests.helpers.launch import deepspeed, python, ranks
from tests.helpers.numbers_worker import POISON, STAGES, TIMEOUT_SECONDS
from tests.helpers.problems import PROBLEMS, write_inputs

pytestmark = pytest.mark.launcher

WORKER = ("-m", "tests.helpers.numbers_worker")
AFTER_TIMEOUT = 30.0
"""Seconds within which every rank must be gone once a collective has failed: account, report and grace, on a busy machine."""

START = 120.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The problems of the engine's tests, with a backbone that has dropout."""
    folder = tmp_path_factory.mktemp("numbers")
    write_inputs(folder, PROBLEMS)
    tiny.save_tiny_bert(folder / "bert", dropout=0.1)
    return folder


@dataclass(frozen=True)
class Ended:
    """A launch of two ranks that ended by themselves: what rank 0 wrote, each rank's exit code and words."""

    content: dict[str, Any]
    codes: tuple[int, int]
    said: tuple[str, str]


def work(mode: str, inputs: Path, folder: Path) -> Ended:
    result = folder / f"{mode}.json"
    with ranks([*WORKER, mode, str(inputs), str(result)], folder / f"{mode}-logs") as (first, second):
        code, said = second.end(2 * START)
        first_code, first_said = first.end(AFTER_TIMEOUT)
    assert result.is_file(), first_said + said
    return Ended(json.loads(result.read_text()), (first_code, code), (first_said, said))


@pytest.fixture(scope="module")
def wrong(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Every stage, plainly and with an infinite loss; then rank 1 is killed."""
    return work("stages", inputs, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def again(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Every stage plainly; then rank 1 raises."""
    return work("plain", inputs, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def stages(wrong: Ended) -> dict[str, Any]:
    content: dict[str, Any] = wrong.content["stages"]
    return content


@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_not_finite_is_never_applied(name, stages):
    found = stages[name]["raise"]
    # The loss is infinite on one rank alone, and its gradient would be finite: all ranks still end alike, and with the same word.
    said = found["said"][0]
    assert found["said"] == [said, said]
    (dump,) = found["dumps"]
    assert dump["number"] == found["steps"] + 1
    assert f"step {dump['number']}: the loss is inf on rank {dump['rank']}" in said
    assert str(POISON) in said.split("training examples ")[1].split(";")[0].split(", ")
    assert found["left"] == found["good"] == dump["parameters"]


@pytest.mark.parametrize("name", STAGES)
def test_skipping_goes_on_with_the_other_examples(name, stages):
    found, plain = stages[name]["skip"], stages[name]["plain"]
    assert (found["steps"], found["finite"]) == (len(plain["losses"]), True)
    assert 0 < found["skipped"] <= 4  # one in each epoch
    assert all(loss < 10 for loss in found["losses"])


def test_the_same_command_computes_the_same_bits(stages, again):
    for name, record in stages.items():
        assert again.content["stages"][name]["plain"] == record["plain"], name
    assert len({record["plain"]["tensors"] for record in stages.values()}) > 1  # the comparison sees a difference


def test_every_group_has_the_runs_timeout(wrong):
    assert len(wrong.content["timeouts"]) > 1  # the world's, and DeepSpeed's own
    assert set(wrong.content["timeouts"]) == {180.0}


def test_a_killed_rank_ends_the_others_long_before_the_timeout(wrong):
    assert wrong.codes == (EXIT_LOST_RANK, -signal.SIGKILL), wrong.said
    assert "error: rank 0 lost another rank (rank 1 gives no sign of life" in wrong.said[0]
    assert "Traceback" not in wrong.said[0]


def test_an_exception_of_one_rank_is_seen_first_and_named_by_the_others(again):
    assert again.codes == (EXIT_LOST_RANK, 1), again.said
    assert "KeyError: 'no such column'" in again.said[1]
    assert "error: rank 0 lost another rank (rank 1 ended first: KeyError: 'no such column')" in again.said[0]
    assert "Traceback" not in again.said[0]


def train(tiny_bert: Path, tiny_data: Path, out: Path, **flags: Any) -> list[str]:
    given: Mapping[str, Any] = {
        "model_name_or_path": tiny_bert, "task_name": "sst2", "data_dir": tiny_data, "output_dir": out, "eval_strategy": "no",
        "save_strategy": "no", "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": "true", **flags,
    }  # fmt: skip
    return ["launch/train.py", *(f"--{name}={value}" for name, value in given.items())]


def test_a_stopped_rank_ends_the_run_at_the_timeout(tiny_bert, tiny_data, tmp_path):
    out, minutes = tmp_path / "run", 0.2
    with ranks(train(tiny_bert, tiny_data, out, max_steps=100_000, timeout_minutes=minutes), tmp_path / "logs") as (first, second):
        _wait_for_step(out / "metrics.jsonl", 3, first)
        second.process.send_signal(signal.SIGSTOP)
        code, said = first.end(60 * minutes + AFTER_TIMEOUT)
        assert code == EXIT_LOST_RANK, said
        assert "error: rank 0 lost another rank (rank 1 gives no sign of life" in said
        assert "Traceback" not in said
        second.process.send_signal(signal.SIGCONT)
        code, said = second.end(AFTER_TIMEOUT)
        assert code == EXIT_LOST_RANK, said
        assert "error: rank 1 " in said


def _wait_for_step(metrics: Path, step: int, rank: Any) -> None:
    until = time.monotonic() + START
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        assert rank.process.poll() is None, rank.log.read_text()
        assert time.monotonic() < until, "training did not begin"
        time.sleep(0.1)


def test_a_rank_that_stands_still_outside_of_collectives_is_ended_too(inputs, tmp_path):
    with ranks([*WORKER, "stall", str(inputs), "unused"], tmp_path / "logs") as both:
        (code, said), (other_code, other_said) = (rank.end(START + TIMEOUT_SECONDS + AFTER_TIMEOUT) for rank in both)
    assert (code, other_code) == (EXIT_LOST_RANK, EXIT_LOST_RANK), said + other_said
    assert "rank 1 gives signs of life, but did not come to where this rank waited" in said
    assert "error: rank 1 ends because another rank was lost: rank 0 ended first" in other_said


def test_a_diverged_run_can_be_replayed(tiny_bert, tiny_data, tmp_path):
    out = tmp_path / "run"
    flags = {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 8, "save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    finished = deepspeed(*train(tiny_bert, tiny_data, out, **flags), ranks=2)
    assert finished.returncode != 0
    (said,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    files = sorted(out.glob("nonfinite-step*.safetensors"))
    assert files
    step = int(files[0].name.split("-")[1].removeprefix("step"))
    assert f"error: step {step}: the loss is nan on rank 0" in said
    assert f"the last good checkpoint is {out / f'checkpoint-{step - 1}'}" in said
    assert all(str(file) in said for file in files)
    replayed = python("launch/train.py", "--replay", str(files[0]))
    assert replayed.returncode == 0, replayed.output
    lines = replayed.stdout.splitlines()
    assert lines[-1] == "reproduced"
    assert any("in the forward pass the output of" in line and "adakron_adapter" in line for line in lines), replayed.output
