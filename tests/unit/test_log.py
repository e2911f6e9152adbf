"""A rank's own log, in processes of their own: one process has one."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from adakron.distributed import EXIT_LOST_RANK
from adakron.redaction import HIDDEN
from tests.helpers.launch import ROOT


def run(script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    head = "import os, sys\nfrom pathlib import Path\nfrom adakron.log import get_logger, keep, keep_log, kept_in, setup_logging\n"
    program = head + "logger = get_logger('adakron.test')\nfile = Path(sys.argv[1])\n" + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_line_of_every_rank_is_kept_from_the_first_on(tmp_path):
    file = tmp_path / "rank1.log"
    file.write_text("of an earlier start\n")
    said = run(
        """
        setup_logging(1)
        logger.info("before there is a folder")
        assert kept_in() is None
        keep_log(file)
        logger.info("a token: hf_AbCdEfGhIjKlMnOp \\x1b[2J")
        logger.warning("for all to see")
        keep("a traceback")
        assert kept_in() == file
        """,
        str(file), "--hub_token", "s3cret",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stderr == "rank 1: for all to see\n"
    first, start, *lines = file.read_text().splitlines()
    assert first == "of an earlier start"
    assert "INFO process " in start and "--hub_token" in start and "s3cret" not in start
    assert [line.split(" ", 1)[1] for line in lines] == [
        "INFO before there is a folder", f"INFO a token: {HIDDEN} \\x1b[2J", "WARNING for all to see", "ERROR a traceback",
    ]  # fmt: skip


def test_where_a_process_dies_of_its_own_code_the_stack_is_kept(tmp_path):
    file = tmp_path / "rank0.log"
    said = run("setup_logging(0)\nkeep_log(file)\ndef inside():\n    os.abort()\ninside()", str(file))
    assert said.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in file.read_text() and "in inside" in file.read_text()


def test_a_signal_shows_where_a_process_stands(tmp_path):
    file = tmp_path / "rank0.log"
    script = (
        "setup_logging(0)\nkeep_log(file)\ndef waiting():\n    os.kill(os.getpid(), signal.SIGUSR2)\nimport signal\nwaiting()\nprint('on')"
    )
    said = run(script, str(file))
    assert (said.returncode, said.stdout) == (0, "on\n")
    assert "in waiting" in file.read_text()


@pytest.mark.parametrize("device", ["/dev/full"])
def test_a_full_disk_costs_lines_only(device):
    said = run("setup_logging(0)\nkeep_log(file)\nlogger.info('said')", device)
    assert (said.returncode, said.stderr) == (0, "said\n")


def test_last_words_are_said_where_the_file_system_hangs(tmp_path):
    fifo = tmp_path / "rank0.log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # nobody reads on: what is written is waited for without end
    script = """
        import threading, time
        from adakron.distributed import _end_for_lost_rank
        setup_logging(0)
        keep_log(file)
        main = threading.Thread(target=lambda: [logger.info("x" * 2000) for _ in range(1000)], daemon=True)
        main.start()
        main.join(1)
        assert main.is_alive()
        _end_for_lost_rank("rank 1 ended first")
        """
    try:
        said = run(script, str(fifo))
    finally:
        os.close(reader)
    assert said.returncode == EXIT_LOST_RANK, said.stderr[-500:]
    assert "ends because another rank was lost: rank 1 ended first" in said.stderr
