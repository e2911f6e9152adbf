"""The loop in docs/reliability.md that starts a run again: run by bash as it stands there, with a launcher that ends as it is told."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from adakron.distributed import EXIT_LOST_RANK
from adakron.signals import EXIT_STOPPED
from launch.program import EXIT_ERROR, EXIT_UNEXPECTED
from tests.helpers.launch import ROOT

KILLED = 256 - 9
"""What the `deepspeed` command makes of a rank that SIGKILL ended."""


@pytest.mark.parametrize(
    ("codes", "starts", "last"),
    [
        ([0], 1, 0),
        ([EXIT_STOPPED, EXIT_LOST_RANK, KILLED, 0], 4, 0),
        ([EXIT_STOPPED, EXIT_ERROR, 0], 2, EXIT_ERROR),
        ([EXIT_UNEXPECTED, 0], 1, EXIT_UNEXPECTED),
        ([EXIT_STOPPED] * 9, 5, EXIT_STOPPED),  # a run that never ends must not look finished
    ],
)
def test_the_loop_goes_on_where_that_helps_and_says_how_it_ended(tmp_path: Path, codes: Sequence[int], starts: int, last: int) -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    loops = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(loops) == 1 and "--resume_from_checkpoint auto" in loops[0]
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/bash\necho "$@" >> calls\nexit "$(sed -n "$(wc -l < calls)p" codes)"\n')
    launcher.chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    finished = subprocess.run(["bash", "-c", loops[0]], cwd=tmp_path, env={**os.environ, "PATH": path}, timeout=60)
    assert len((tmp_path / "calls").read_text().splitlines()) == starts
    assert finished.returncode == last
