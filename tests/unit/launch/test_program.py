import sys

import pytest

from adakron.errors import ConfigError
from launch import program
from tests.helpers.launch import run

LAUNCHER = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def failing(arguments, world):
    raise ConfigError(["first", "second"])


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["program"])


def test_an_error_is_one_paragraph_and_code_2(capsys):
    assert program.run_program(failing) == 2
    assert capsys.readouterr().err == "error: 2 problems\n  - first\n  - second\n"


@pytest.mark.parametrize(("local_rank", "printed"), [("0", True), ("1", False)])
def test_one_rank_of_a_host_speaks_for_all(local_rank, printed, monkeypatch, capsys):
    for name, value in (LAUNCHER | {"LOCAL_RANK": local_rank}).items():
        monkeypatch.setenv(name, value)
    assert program.run_program(failing) == 2
    assert ("first" in capsys.readouterr().err) is printed


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
