import sys

import pytest

from adakron.errors import ConfigError
from launch import program
from tests.helpers.launch import deepspeed, run

LAUNCHER = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def failing(arguments, world):
    raise ConfigError(["first", "second"])


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # join() sets them: taken back after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["program"])


def test_an_error_is_one_paragraph_and_code_2(capsys):
    assert program.run_program(failing) == 2
    assert capsys.readouterr().err == "error: 2 problems\n  - first\n  - second\n"


def test_a_silent_rank_waits_for_the_one_that_speaks_and_speaks_itself_where_that_does_not_come(monkeypatch, capsys):
    for name, value in (LAUNCHER | {"LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(program.time, "sleep", waited.append)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    assert program.run_program(failing) == 2
    assert waited == [program.SPEAKER_SECONDS]
    assert "first" in capsys.readouterr().err


SLOW_SPEAKER = """
import time
from adakron.errors import ConfigError
from launch.program import execute

def main(arguments, world):
    time.sleep(0 if world.rank else 4)
    raise ConfigError("wrong")

execute(main)
"""


def test_an_error_of_all_ranks_is_said_once_even_where_the_speaker_is_slow(tmp_path):
    (tmp_path / "program.py").write_text(SLOW_SPEAKER)
    finished = deepspeed(str(tmp_path / "program.py"), ranks=2)
    assert finished.returncode == 2, finished.output
    assert finished.stderr.count("error: wrong") == 1, finished.output


def test_a_broken_launcher_environment_is_an_error_too(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert program.run_program(failing) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err


def test_success_is_0_and_other_exceptions_pass():
    assert program.run_program(lambda arguments, world: None) == 0
    assert program.run_program(lambda arguments, world: 1) == 1
    with pytest.raises(ZeroDivisionError):
        program.run_program(lambda arguments, world: 1 // 0)  # type: ignore[func-returns-value]


ENDING = """
import atexit
from launch.program import execute

def main(arguments, world):
    atexit.register(lambda: print("at exit"))
    print("written")
    {end}

execute(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("pass", 0, ""), ("1 / 0", 1, "ZeroDivisionError"), ("raise SystemExit(3)", 3, ""), ("raise KeyboardInterrupt", 130, "interrupted")],
)
def test_a_process_ends_with_its_true_code_and_all_its_output(end, code, said):
    finished = run([sys.executable, "-c", ENDING.format(end=end)])
    assert finished.returncode == code, finished.output
    assert finished.stdout == "written\nat exit\n"
    assert said in finished.stderr
    assert ("Traceback" in finished.stderr) is (code == 1)
