"""What a listener does with signals, in processes of their own."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from adakron.signals import EXIT_INTERRUPTED, EXIT_STOPPED
from tests.helpers.launch import ROOT

SCRIPT = """
import sys, time
from adakron.signals import SignalListener
listener = SignalListener()
listener.listen()
if "defer" in sys.argv:
    listener.defer()
print("ready", flush=True)
for _ in range(500):
    time.sleep(0.01)
print(listener.asked, flush=True)
"""


@contextmanager
def listening(*words: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", SCRIPT.replace("500", "120"), *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_at_first_a_signal_ends_the_process(number):
    with listening() as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == EXIT_STOPPED
    assert f"stopped by {number.name} before training began" in errors


@pytest.mark.parametrize("variables", [{"RANK": "1", "LOCAL_RANK": "1"}, {"SLURM_PROCID": "1"}])
def test_at_first_the_rank_that_was_signalled_says_so(monkeypatch, variables):
    for name in ("RANK", "LOCAL_RANK"):  # a process group that an earlier test formed leaves these
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with listening() as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == EXIT_STOPPED
    assert errors == "rank 1: stopped by SIGTERM before training began; nothing was written\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_later_it_asks(number):
    with listening("defer") as process:
        process.send_signal(number)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output) == (0, f"{number.name}\n")
    assert f"{number.name}: stopping at the next step" in errors
    assert ("Ctrl-C twice within 3 s" in errors) == (number == signal.SIGINT)


@pytest.mark.parametrize(
    ("numbers", "apart", "code"),
    [
        ((signal.SIGINT, signal.SIGINT), 0.5, EXIT_INTERRUPTED),
        ((signal.SIGINT, signal.SIGINT), 0.05, 0),  # a terminal's and its launcher's, of one key
        ((signal.SIGINT, signal.SIGINT, signal.SIGINT), 0.2, EXIT_INTERRUPTED),
        ((signal.SIGTERM, signal.SIGTERM), 0.5, 0),  # Slurm sends two
        ((signal.SIGINT, signal.SIGTERM), 0.5, 0),  # the terminal's, then the launcher's
    ],
)
def test_only_a_second_interrupt_leaves_at_once(numbers, apart, code):
    with listening("defer") as process:
        for number in numbers:
            process.send_signal(number)
            time.sleep(apart)
        output, _ = process.communicate(timeout=10)
    assert process.returncode == code
    if not code:
        assert output == f"{numbers[0].name}\n"
