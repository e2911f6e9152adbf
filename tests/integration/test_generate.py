"""launch/generate.py on a saved run: ranks, stages, and whatever kills or stops it."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from adakron.signals import EXIT_STOPPED
from tests.helpers.launch import Finished, deepspeed, deepspeed_command, python, start
from tests.helpers.saved_runs import write_run
from tests.helpers.tiny import save_byte_gpt2, sentences, write_jsonl

pytestmark = pytest.mark.launcher

SOURCES = list(dict.fromkeys(sentences(29, seed=3, longest=9)))
SETTINGS = ("--num_beams", "3", "--max_new_tokens", "24", "--eos_token_id", "25,108", "--min_new_tokens", "1")
PATIENCE = 120.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of task pairs whose test split has an odd number of sources, each in two rows with references of their own."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {"source": source, "target": [f"{source} {part}", f"{part}\nof {number}"]} for part in "ab" for number, source in enumerate(SOURCES)
    ]
    write_jsonl(folder / "data" / "test.jsonl", rows)
    write_jsonl(folder / "data" / "train.jsonl", rows[:3])
    save_byte_gpt2(folder / "model")
    return write_run(
        folder / "run", folder / "model", seed=1, task_name="pairs", data_dir=str(folder / "data"), method="madakron_partial",
        num_experts=3, expert_scores="random",
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(run: Path) -> list[dict[str, Any]]:
    """The rows of one rank that nothing disturbs, in the run's folder."""
    finished = python("launch/generate.py", str(run), *SETTINGS)
    assert finished.returncode == 0, finished.output
    assert f"{len(SOURCES)} texts in {run / 'generated_test.jsonl'} (" in finished.stdout
    return rows_of(run / "generated_test.jsonl")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def lines_kept(output: Path) -> int:
    """Rows in the part files so far, whole or not."""
    parts = output.with_name(f"{output.name}.parts").glob("rows-rank*.jsonl")
    return sum(max(0, file.read_bytes().count(b"\n") - 1) for file in parts)


class Running:
    """A generation under way, with its launcher."""

    def __init__(self, command: Sequence[str], output: Path):
        self.process, self.output = start(command), output

    def wait_for(self, rows: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while lines_kept(self.output) < rows:
            assert self.process.poll() is None, self.finish().output
            assert time.monotonic() < deadline, "the generation hangs"
            time.sleep(0.002)

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if any(word.startswith("--local_rank=") for word in child.cmdline())]

    def finish(self) -> Finished:
        stdout, stderr = self.process.communicate(timeout=PATIENCE)
        return Finished(self.process.returncode, stdout, stderr)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def interrupt(command: Sequence[str], output: Path, rows: int, action: Callable[[Running], None]) -> Finished:
    """Start a command, act when so many rows are kept, and wait for its end."""
    running = Running(command, output)
    try:
        running.wait_for(rows)
        action(running)
        return running.finish()
    finally:
        running.kill()


def test_files(run: Path, expected: list[dict[str, Any]]) -> None:
    assert [row["index"] for row in expected] == list(range(len(SOURCES)))
    assert [row["source"] for row in expected] == SOURCES
    assert expected[4]["references"] == [f"{SOURCES[4]} a", "a\nof 4", f"{SOURCES[4]} b", "b\nof 4"]
    assert len({len(row["text"]) for row in expected}) > 3
    lines = (run / "generated_test.hypotheses.txt").read_text(encoding="utf-8").split("\n")
    assert lines == [" ".join(row["text"].split()) for row in expected] + [""]
    groups = (run / "generated_test.references.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
    assert [group.split("\n") for group in groups] == [[" ".join(text.split()) for text in row["references"]] for row in expected]
    assert not (run / "generated_test.jsonl.parts").exists()
    again = python("launch/generate.py", str(run), *SETTINGS)
    assert again.returncode == 2
    assert "generated_test.references.txt would be overwritten; name another file with --output_file" in again.stderr


def test_killed_on_two_ranks_at_zero3_and_finished_on_one(run: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = (str(run), *SETTINGS, "--output_file", str(output))
    # Whole batches of three, so the second rank has one batch less, and texts end at different lengths.
    stage3 = ("--deepspeed", "ds_configs/zero3_fp32.json", "--per_device_eval_batch_size", "3")
    interrupt(
        deepspeed_command("launch/generate.py", *words, *stage3, ranks=2), output, 8, lambda one: os.killpg(one.process.pid, signal.SIGKILL)
    )
    kept = lines_kept(output)
    assert 8 <= kept < len(SOURCES)
    assert not output.exists()
    for file in (tmp_path / "out.jsonl.parts").glob("rows-rank1.jsonl"):
        file.write_bytes(file.read_bytes() + b'{"index": 3, "tex')  # half a line, wherever the kill fell
    other = python("launch/generate.py", *words, "--num_beams", "2")
    assert other.returncode == 2
    assert "made otherwise: num_beams was 3, now 2; repeat the settings to go on" in other.stderr
    finished = python("launch/generate.py", *words)
    assert finished.returncode == 0, finished.output
    assert f"holds {kept} of {len(SOURCES)} rows: {len(SOURCES) - kept} are left" in finished.stderr
    assert rows_of(output) == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.hypotheses.txt", "out.jsonl", "out.references.txt"]


def test_one_of_two_ranks_is_signalled_and_two_at_zero3_finish(run: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = (str(run), *SETTINGS, "--output_file", str(output))
    command = deepspeed_command("launch/generate.py", *words, "--per_device_eval_batch_size", "1", ranks=2)
    stopped = interrupt(command, output, 4, lambda one: one.ranks()[1].send_signal(signal.SIGUSR1))
    kept = lines_kept(output)
    assert 4 <= kept < len(SOURCES)
    assert stopped.returncode != 0
    assert f"stopped by SIGUSR1: {kept} of {len(SOURCES)} rows are kept; the same command goes on" in stopped.stderr
    # Three batches for two ranks: the second has to compute beside the first, whose texts end at other lengths.
    left = len(SOURCES) - kept
    batch = next(size for size in range(1, left) if -(-left // size) == 3)
    finished = deepspeed(
        "launch/generate.py", *words, "--deepspeed", "ds_configs/zero3_fp32.json", "--per_device_eval_batch_size", str(batch), ranks=2
    )
    assert finished.returncode == 0, finished.output
    assert rows_of(output) == expected


def test_a_budget_of_time_stops_it(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    stopped = python("launch/generate.py", str(run), *SETTINGS, "--output_file", str(output), "--max_hours", "1e-6")
    assert stopped.returncode == EXIT_STOPPED, stopped.output
    assert "stopped by max_hours 1e-06: 0 of" in stopped.stderr


def test_texts_and_the_backbone_alone(run: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    sources = tmp_path / "sources.txt"
    sources.write_text("\n".join(SOURCES[:5]) + "\n", encoding="utf-8")
    output = tmp_path / "out.jsonl"
    bare = python(
        "launch/generate.py", str(run), *SETTINGS, "--source_file", str(sources), "--output_file", str(output), "--without_adapter"
    )
    assert bare.returncode == 0, bare.output
    assert [row["source"] for row in rows_of(output)] == SOURCES[:5]
    assert [row["text"] for row in rows_of(output)] != [row["text"] for row in expected[:5]]
    assert sorted(file.name for file in tmp_path.glob("out*")) == ["out.hypotheses.txt", "out.jsonl"]
    printed = python("launch/generate.py", str(run), *SETTINGS, "--text", SOURCES[2], "--text", SOURCES[0])
    assert printed.returncode == 0, printed.output
    assert expected[2]["text"] + "\n" + expected[0]["text"] in printed.stdout
