"""What one sees of a run from outside: the heartbeat, the slowest rank, each rank's log, who failed first."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.launch import BIN, deepspeed_command, free_port, logged, run, start

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(300)]

START = 120.0
LONG = 100_000


def flags(tiny_bert: Path, tiny_data: Path, out: Path, max_steps: int) -> list[str]:
    given = {
        "deepspeed": "ds_configs/zero2_fp32.json", "model_name_or_path": tiny_bert, "task_name": "sst2", "data_dir": tiny_data,
        "output_dir": out, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 10, "max_steps": max_steps,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


def beat(out: Path) -> dict:
    file = out / "heartbeat.json"
    return json.loads(file.read_text()) if file.is_file() else {"step": 0, "doing": ""}


def wait_for(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + START
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def test_a_stall_and_the_slowest_rank_show_from_outside(tiny_bert, tiny_data, tmp_path):
    out = tmp_path / "run"
    process = start(deepspeed_command("launch/train.py", *flags(tiny_bert, tiny_data, out, LONG), ranks=2), env={"DS_ACCELERATOR": "cpu"})
    try:
        wait_for(lambda: beat(out)["step"] > 0, "training began")
        (slow,) = [one for one in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in one.cmdline()]
        already = len(logged(out, "train/straggler_rank"))
        for _ in range(12):  # so that some meet it while it computes
            slow.send_signal(signal.SIGSTOP)
            time.sleep(0.4)
            slow.send_signal(signal.SIGCONT)
            time.sleep(0.1)
        slow.send_signal(signal.SIGSTOP)
        time.sleep(1)
        still = beat(out)
        time.sleep(7)
        assert beat(out) == still  # a run that goes on writes every five seconds
        assert (still["doing"], still["ranks"], still["max_steps"]) == ("training", 2, LONG)
        slow.send_signal(signal.SIGCONT)
        wait_for(lambda: beat(out)["step"] > still["step"], "it went on")
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=START)
        ended = beat(out)
        assert (ended["doing"], ended["step"]) == ("stopped", json.loads((out / "stopped.json").read_text())["step"])
        lags = list(zip(logged(out, "train/straggler_seconds")[already:], logged(out, "train/straggler_rank")[already:], strict=True))
        seconds, rank = max(lags)
        assert rank == 1, lags
        assert seconds * 10 > 0.3, lags  # per step, of ten
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_rank_that_fails_first_is_the_one_that_is_shown(tiny_bert, tiny_data, tmp_path):
    out = tmp_path / "run"
    command = [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}", "--module", "tests.helpers.failing_rank"]
    finished = run([*command, *flags(tiny_bert, tiny_data, out, LONG)], env={"DS_ACCELERATOR": "cpu"}, timeout=START)
    assert finished.returncode == 1
    # The launcher's own account, at the end, has the traceback of rank 1 as the root cause, not what rank 0 made of it.
    cause = finished.stderr[finished.stderr.index("Root Cause") :]
    assert "rank      : 1" in cause and "KeyError: 'no such column; api_key=" in cause, finished.output
    assert "lost another rank" not in cause
    assert finished.stderr.index("rank 1:\nTraceback") < finished.stderr.index("error: rank 0 lost another rank")
    own = {rank: (out / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1)}
    assert "in failing" in own[1] and "KeyError: 'no such column; api_key=" in own[1]
    assert "rank 1 ended first: KeyError: 'no such column; " in own[0]
    assert f"what each rank said: {out / 'logs' / 'rank*.log'}" in own[0]
    assert "Traceback" not in own[0]
    assert beat(out)["doing"] == "failed"
    assert "s3cret" not in finished.output + own[0] + own[1]
