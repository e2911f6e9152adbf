import logging
import os
import sys
from pathlib import Path

import pytest

from adakron.engine.upstream import STALE_AFTER_SECONDS, keep_builds_in_environment, quiet_initialisation, stale_build_locks

NOW = 1_800_000_000.0


@pytest.fixture
def builds(tmp_path):
    """A folder of builds: one killed long ago, one at work, one finished."""
    for name, age in (("killed", STALE_AFTER_SECONDS + 1), ("at_work", STALE_AFTER_SECONDS - 1)):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.touch()
        os.utime(lock, (NOW - age, NOW - age))
    (tmp_path / "py311_cpu" / "finished").mkdir()
    (tmp_path / "py311_cpu" / "finished" / "finished.so").touch()
    os.utime(tmp_path / "py311_cpu" / "finished" / "finished.so", (0, 0))
    return tmp_path


def test_only_the_lock_of_a_killed_build_is_stale(builds):
    assert stale_build_locks(builds, NOW) == [builds / "py311_cpu" / "killed" / "lock"]


def test_no_folder_of_builds_has_no_locks(tmp_path):
    assert stale_build_locks(tmp_path / "none", NOW) == []


def test_a_lock_that_vanishes_while_looking_is_not_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / "just_finished" / "lock"]))
    assert stale_build_locks(tmp_path, NOW) == []


def test_builds_stay_inside_the_environment(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    keep_builds_in_environment()
    chosen = os.environ["TORCH_EXTENSIONS_DIR"]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "elsewhere")  # also gives monkeypatch the variable to restore
    assert os.path.dirname(chosen) == sys.prefix
    keep_builds_in_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "elsewhere"


def test_initialisation_is_quiet_and_then_speech_returns(capsys):
    reports = logging.getLogger("DeepSpeed")
    before = reports.level
    with pytest.raises(RuntimeError, match="failed"), quiet_initialisation():
        print("memory report")
        assert not reports.isEnabledFor(logging.WARNING)
        raise RuntimeError("failed")
    print("after")
    assert capsys.readouterr().out == "after\n"
    assert reports.level == before
