"""The contract with PEFT holds for every minor release that setup.cfg allows, not only for the one that is installed."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, run

pytest.importorskip("peft")

MINORS = ("0.20", "0.21")
OTHERS = [minor for minor in MINORS if not version("peft").startswith(f"{minor}.")]


@pytest.fixture(scope="session", params=OTHERS)
def other_peft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A minor release of PEFT and a folder that holds it, kept in pytest's cache; skips where pip cannot fetch it."""
    minor = str(request.param)
    kept = request.config.cache.mkdir("peft") / minor
    if not (kept / "peft").is_dir():
        fresh = tmp_path_factory.mktemp("peft") / minor
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh), f"peft=={minor}.*"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"pip cannot fetch peft {minor}: {str(error.stderr).strip()[-200:]}")
        # Whole or not at all, also beside another pytest.
        if not kept.exists():
            shutil.move(fresh, kept)
    return minor, kept


def test_setup_allows_exactly_these_minors():
    text = (ROOT / "setup.cfg").read_text()
    assert f"peft>={MINORS[0]},<0.{int(MINORS[-1].split('.')[1]) + 1}" in text


def test_the_contract_holds_there_too(other_peft):
    minor, folder = other_peft
    env = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    found = run([sys.executable, "-c", "import peft; print(peft.__version__)"], env=env)
    assert found.stdout.startswith(f"{minor}."), found.output
    finished = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/peft"], env=env)
    assert finished.returncode == 0, finished.output
    assert " passed" in finished.stdout and "skipped" not in finished.stdout, finished.output
