"""Writers killed by SIGKILL: at every system call, and at random moments (ADAKRON_KILLS sets how many; 100 by default)."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import run

KILLS = int(os.environ.get("ADAKRON_KILLS", "100"))


def killer(*arguments: str) -> Any:
    finished = run([sys.executable, "-m", "tests.helpers.checkpoint_killer", *arguments], timeout=60 + KILLS)
    assert finished.returncode == 0, finished.output
    return json.loads(finished.stdout)


def test_a_kill_at_every_system_call_loses_nothing() -> None:
    # In memory where there is such a place: what is killed is the process, not the disk, and syncing takes most of the time.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        report = killer("calls", f"{folder}/kills")
    if report is None:
        pytest.skip("this system lets no process trace its child (ptrace)")
    assert report["failures"] == []
    # Every stage was interrupted, or the calls were not those of the work.
    assert report["kills"] > 400 and all(report["leftovers"][kind] > 20 for kind in ("staging", "replaced", "deleted", "partial"))


@pytest.mark.timeout(120 + KILLS)
def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    report = killer("moments", str(tmp_path / "run"), str(KILLS))
    assert report["failures"] == []
    assert report["kills"] == KILLS and report["leftovers"]["staging"] > KILLS / 20
