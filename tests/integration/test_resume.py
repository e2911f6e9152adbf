"""Runs that are stopped, killed and gone on with: the end is that of a run which nobody disturbed."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adakron.checkpoint import newest_resumable
from adakron.signals import EXIT_INTERRUPTED, EXIT_STOPPED
from tests.helpers import tiny
from tests.helpers.interrupted import Running, running, send
from tests.helpers.launch import Finished, deepspeed, logged, python

pytestmark = pytest.mark.launcher

STEPS = 160
AUTO = ("--resume_from_checkpoint", "auto")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run on 50 examples: 7 steps an epoch of 8 examples, the last one short."""
    home = tmp_path_factory.mktemp("inputs")
    return [
        "--model_name_or_path", str(tiny.save_tiny_bert(home / "model")), "--task_name", "sst2", "--bottleneck_dim", "8",
        "--data_dir", str(tiny.write_classification(home / "data")), "--logging_steps", "1", "--disable_tqdm", "yes",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def long(base: list[str]) -> list[str]:
    """A run of two ranks with dropout, a mixture and a best adapter, in bf16 at stage 2."""
    return [
        *base, "--deepspeed", "ds_configs/zero2.json", "--per_device_train_batch_size", "4", "--max_steps", str(STEPS), "--dropout", "0.1",
        "--method", "madakron", "--eval_strategy", "steps", "--eval_steps", "25", "--save_strategy", "steps", "--save_steps", "40",
        "--load_best_model_at_end", "--learning_rate", "1e-2",
    ]  # fmt: skip


def assert_same_end(found: Path, expected: Path) -> None:
    assert (found / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "eval/accuracy", "eval/loss"):
        assert logged(found, name) == logged(expected, name), name
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (found, expected)]
    timed = {
        "samples_per_second", "tokens_per_second", "peak_memory_mib", "eval_runtime", "eval_samples_per_second",
        "compute_seconds", "straggler_seconds", "straggler_rank",
    }  # fmt: skip
    for state in states:
        state["log_history"] = [{key: value for key, value in entry.items() if key not in timed} for entry in state["log_history"]]
    assert states[0] == states[1]
    events = [EventAccumulator(str(folder / "tensorboard")).Reload() for folder in (found, expected)]
    steps = [[event.step for event in accumulator.Scalars("train/loss")] for accumulator in events]
    assert steps[0] == steps[1]


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def assert_stopped(run: Running, asked: str) -> int:
    """The step at which a run that was asked to stop says it stopped; its checkpoint is there."""
    finished = run.finish()
    assert finished.returncode == EXIT_STOPPED, finished.output
    assert "Traceback" not in finished.stderr
    said = re.search(rf"stopped by {asked} (?:in the evaluation )?at step (\d+)", finished.stderr)
    assert said, finished.stderr
    step = int(said[1])
    assert steps_saved(run.folder)[-1] == step
    marked = json.loads((run.folder / "stopped.json").read_text())
    assert (marked["stopped_by"], marked["step"]) == (asked, step)
    return step


@pytest.mark.timeout(600)  # eight launches
def test_two_ranks_stop_in_step_however_they_are_asked_and_lose_nothing(tmp_path, long):
    undisturbed = deepspeed("launch/train.py", *long, "--output_dir", str(tmp_path / "undisturbed"), ranks=2)
    assert undisturbed.returncode == 0, undisturbed.output
    folder = tmp_path / "stopped"
    steps = [0]
    for number, to, skew in (
        (signal.SIGTERM, (0, 1), 0.0), (signal.SIGINT, (1, 0), 0.2), (signal.SIGUSR1, (0, 1), 1.0), (signal.SIGTERM, (1,), 0.0),
    ):  # fmt: skip
        with running(folder, [*long, *AUTO], ranks=2) as run:
            run.wait_for_lines(10)
            send(run, number, to=to, skew=skew)
            steps.append(assert_stopped(run, number.name))
        assert steps[-1] > steps[-2]
    # Killed at any moment, with whatever is half-written then.
    with running(folder, [*long, *AUTO], ranks=2) as run:
        run.wait_for_lines(5)
        time.sleep(random.uniform(0.0, 0.5))
        send(run, signal.SIGKILL, to=(random.randrange(2),))
        assert run.finish().returncode != 0
    assert not (folder / "stopped.json").exists()  # a killed run did not stop on request
    assert steps_saved(folder)[-1] >= steps[-1]
    finished = deepspeed("launch/train.py", *long, *AUTO, "--output_dir", str(folder), ranks=2)
    assert finished.returncode == 0, finished.output
    assert_same_end(folder, tmp_path / "undisturbed")
    assert [went_on["step"] for went_on in json.loads((folder / "run.json").read_text())["resumed"]][:4] == steps[1:]


@pytest.fixture(scope="module")
def short(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Flags of a run of one rank in fp32 without dropout, and its folder, with every checkpoint."""
    flags = [
        *base,
        "--max_steps",
        "20",
        "--save_strategy",
        "steps",
        "--save_steps",
        "9",
        "--save_total_limit",
        "9",
        "--learning_rate",
        "1e-2",
    ]
    folder = tmp_path_factory.mktemp("short") / "run"
    finished = one_rank(flags, "--per_device_train_batch_size", "8", "--output_dir", str(folder))
    assert finished.returncode == 0, finished.output
    return flags, folder


def one_rank(*arguments: str | list[str], stage: str = "zero2_fp32") -> Finished:
    flat = [word for given in arguments for word in ([given] if isinstance(given, str) else given)]
    return python("launch/train.py", "--deepspeed", f"ds_configs/{stage}.json", *flat)


def test_a_checkpoint_goes_on_under_other_ranks_and_another_stage(tmp_path, short):
    flags, folder = short
    stage3 = tmp_path / "zero3_fp32.json"
    stage3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 40}}))
    finished = deepspeed(
        "launch/train.py", "--deepspeed", str(stage3), *flags, "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint",
        str(folder / "checkpoint-9"), ranks=2,
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "other", folder))
    deviations = {name: float((found[name] - tensor).abs().max()) for name, tensor in expected.items()}
    assert max(deviations.values()) <= 1e-6, deviations
    assert logged(tmp_path / "other") == pytest.approx(logged(folder)[9:], abs=1e-6)
    assert re.search(r"s since it went on at step 9; [0-9.]+ s of training in all", finished.stdout), finished.stdout
    (entry,) = json.loads((tmp_path / "other" / "run.json").read_text())["resumed"]
    assert (entry["step"], entry["world_size"], entry["stage"]) == (9, 2, 3)


@pytest.mark.parametrize("stage", ["zero2_offload", "zero3_offload"])
def test_a_checkpoint_goes_on_with_states_in_the_hosts_memory_and_from_there_without(tmp_path, short, stage):
    flags, folder = short
    batch = ("--per_device_train_batch_size", "8")
    offloaded = tmp_path / "offloaded"
    finished = one_rank(
        flags, *batch, "--output_dir", str(offloaded), "--resume_from_checkpoint", str(folder / "checkpoint-9"), stage=stage
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    back = tmp_path / "back"
    finished = one_rank(
        flags, *batch, "--output_dir", str(back), "--resume_from_checkpoint", str(offloaded / "checkpoint-18")
    )  # fmt: skip
    assert finished.returncode == 0, finished.output
    expected = load_file(folder / "adapter_model.safetensors")
    for place in (offloaded, back):
        found = load_file(place / "adapter_model.safetensors")
        assert max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) <= 1e-6


def test_what_must_not_change_is_named_at_once(tmp_path, short):
    flags, folder = short
    data = tiny.write_classification(tmp_path / "other", train=40)
    finished = one_rank(
        flags, "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--seed", "1", "--data_dir", str(data),
        "--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint", str(folder / "checkpoint-9"),
    )  # fmt: skip
    assert finished.returncode == 2
    for part in (
        "4 problems",
        "learning_rate was 0.01, it is 0.001",
        "seed was 42",
        "took 8 examples, it would take 4",
        "50 examples, 40 now",
    ):
        assert part in finished.stderr, finished.stderr
    assert not (tmp_path / "new").exists()


def test_where_to_go_on(tmp_path, short):
    flags, folder = short
    batch = ("--per_device_train_batch_size", "8")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    finished = one_rank(flags, *batch, *AUTO, "--output_dir", str(folder))
    assert finished.returncode == 0
    assert "holds a finished run: nothing is left to do" in finished.stdout
    older = one_rank(flags, *batch, "--resume_from_checkpoint", str(folder / "checkpoint-18"))
    assert older.returncode == 2
    assert "has a newer checkpoint, checkpoint-20" in older.stderr
    nowhere = one_rank(flags, *batch, "--resume_from_checkpoint", str(tmp_path))
    assert "neither a run folder" in nowhere.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # Damaged: the newest is passed over, and where none is left nothing is begun anew in silence.
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "all_results.json").unlink()
    state = copy / "checkpoint-20" / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    refused = python("launch/evaluate.py", str(state.parent))
    assert refused.returncode == 2
    assert "checkpoint-20 is damaged: training_state.safetensors has" in refused.stderr
    passed_over = one_rank(flags, *batch, *AUTO, "--output_dir", str(copy))
    assert passed_over.returncode == 0, passed_over.output
    assert "checkpoint-20 is passed over" in passed_over.stderr
    assert_same_end(copy, folder)


def test_a_stop_inside_an_evaluation_leaves_it_to_be_made_again(tmp_path, base):
    data = tiny.write_classification(tmp_path / "data", validation=4000)
    flags = [
        *base, "--deepspeed", "ds_configs/zero0_fp32.json", "--per_device_train_batch_size", "8", "--data_dir", str(data),
        "--per_device_eval_batch_size", "2", "--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no",
    ]  # fmt: skip
    with running(tmp_path / "run", flags) as run:
        run.wait_until(lambda: run.logged() == 2)  # an evaluation of 2000 batches begins
        time.sleep(0.3)
        send(run, signal.SIGTERM, to=(0,))
        assert assert_stopped(run, "SIGTERM") == 2
    assert logged(run.folder, "eval/accuracy") == []
    assert one_rank(flags, *AUTO, "--output_dir", str(run.folder), stage="zero0_fp32").returncode == 0
    assert [entry["step"] for entry in json.loads((run.folder / "trainer_state.json").read_text())["log_history"]] == [1, 2, 2, 3, 3]
    assert len(logged(run.folder, "eval/accuracy")) == 2


def test_a_second_interrupt_leaves_at_once_even_where_a_peer_hangs(tmp_path, long):
    with running(tmp_path / "run", long, ranks=2) as run:
        run.wait_until(lambda: bool(steps_saved(run.folder)))
        first, hanging = run.ranks()
        hanging.suspend()
        first.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert first.is_running()  # it waits for its peer inside a collective
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=5) in (EXIT_INTERRUPTED, None)  # None: not our child, but gone
        hanging.kill()
        finished = run.finish()
    assert finished.returncode == EXIT_INTERRUPTED, finished.output
    found = newest_resumable(run.folder)
    assert found.checkpoint is not None
    assert not found.rejected


def test_hours_run_out(tmp_path, base):
    flags = [*base, "--deepspeed", "ds_configs/zero0_fp32.json", "--max_steps", "1000000", "--eval_strategy", "no", "--save_strategy", "no"]
    with running(tmp_path / "run", [*flags, "--max_hours", str(14 / 3600)]) as run:
        assert_stopped(run, "max_hours 0.00388889")


def test_a_stop_before_training_writes_nothing(tmp_path, base):
    with running(tmp_path / "run", base) as run:
        time.sleep(1.0)  # imports
        send(run, signal.SIGTERM, to=(0,))
        finished = run.finish()
    assert finished.returncode == EXIT_STOPPED, finished.output
    assert "stopped by SIGTERM before training began" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_saved_is_small(short):
    _, folder = short
    files = {path.name: path for path in (folder / "checkpoint-9").iterdir()}
    assert sum(path.stat().st_size for path in files.values()) < 200_000
    assert len({path.stat().st_mode for path in files.values()}) == 1
    tensors = load_file(files["training_state.safetensors"])
    assert {name.split("/")[0] for name in tensors} == {"master", "exp_avg", "exp_avg_sq"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
