"""Rows survive whatever kills their writer, and nothing is mixed with rows of another job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adakron.errors import ConfigError
from adakron.row_store import RowStore, holds_rows
from tests.helpers.launch import ROOT

DESCRIPTION = {"num_beams": 4, "prompts": "abc", "eos_token_id": [1, 2], "note": None}


def row(index: int, text: str = "a text") -> dict[str, object]:
    return {"index": index, "text": text}


def write(store: RowStore, rank: int, *rows: dict[str, object]) -> None:
    with store.writer(rank) as writer:
        for one in rows:
            writer.append([one])


def store_in(folder: Path, count: int = 10, **changes: object) -> RowStore:
    return RowStore(folder / "out.parts", DESCRIPTION | changes, count)


def test_rows_of_all_ranks_come_back(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    assert store.recover() == {}
    write(store, 0, row(3), row(0, 'quotes " and\nlines\u2028 \N{SNOWMAN} \r'))
    write(store, 1, row(7))
    write(store, 0, row(9))  # a second time, by another process
    assert store.recover() == {3: row(3), 0: row(0, 'quotes " and\nlines\u2028 \N{SNOWMAN} \r'), 7: row(7), 9: row(9)}
    assert len((store.folder / "rows-rank0.jsonl").read_text(encoding="utf-8").split("\n")) == 1 + 3 + 1


@pytest.mark.parametrize("cut", range(1, 60, 4))
def test_half_a_line_is_taken_off_and_written_again(tmp_path: Path, cut: int) -> None:
    store = store_in(tmp_path)
    write(store, 0, row(3), row(0))
    file = store.folder / "rows-rank0.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    found = store.recover()
    assert found == {index: row(index) for index in (3, 0)[: 2 - -(-cut // len(json.dumps(row(3)) + "\n"))]}
    write(store, 0, row(0), row(5))
    assert store.recover() == found | {0: row(0), 5: row(5)}


def test_a_header_that_was_cut_off(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    write(store, 0, row(1))
    file = store.folder / "rows-rank0.jsonl"
    file.write_bytes(file.read_bytes()[:20])
    assert store.recover() == {}
    write(store, 0, row(1))
    assert store.recover() == {1: row(1)}


def test_zeros_that_a_power_cut_left(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    write(store, 0, row(1))
    with (store.folder / "rows-rank0.jsonl").open("ab") as file:
        file.write(b"\0" * 40 + b"\n")
    assert store.recover() == {1: row(1)}
    write(store, 0, row(2))
    assert store.recover() == {1: row(1), 2: row(2)}


def test_another_job_is_refused(tmp_path: Path) -> None:
    write(store_in(tmp_path), 1, row(1))
    with pytest.raises(ConfigError, match=r"made otherwise: num_beams was 4, now 5, note was absent, now x; repeat the settings"):
        store_in(tmp_path, num_beams=5, note="x").recover()
    with pytest.raises(ConfigError, match="rows was 10, now 11"):
        store_in(tmp_path, count=11).recover()
    assert store_in(tmp_path).recover() == {1: row(1)}


def test_a_row_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    write(store_in(tmp_path), 0, row(10))
    with pytest.raises(ConfigError, match="a row of index 10, where 0 to 9 are"):
        store_in(tmp_path).recover()


def test_removing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    write(store, 0, row(1))
    assert holds_rows(store.folder)
    (store.folder / "mine.txt").write_text("keep")
    store.remove()
    assert not holds_rows(store.folder) and not store.folder.exists()
    assert [file.name for file in tmp_path.rglob("*.*") if file.is_file()] == ["mine.txt"]
    store.remove()


WRITER = """
import sys
from pathlib import Path
from adakron.row_store import RowStore
store = RowStore(Path(sys.argv[1]), {"job": 1}, 10**6)
done = store.recover()
with store.writer(int(sys.argv[2])) as writer:
    for index in range(10**6):
        if index not in done:
            writer.append([{"index": index, "text": "x" * (index % 3000)}])
            print(index, flush=True)
"""


def test_killed_writers_lose_nothing_they_said_was_done(tmp_path: Path) -> None:
    said: list[int] = []
    for attempt in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "parts"), str(attempt % 2)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(5 + attempt):
            said.append(int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        process.stdout.close()
        process.wait()
        found = RowStore(tmp_path / "parts", {"job": 1}, 10**6).recover()
        assert {*said} <= {*found}
        assert [*range(max(found) + 1)] == sorted(found)
        assert all(len(found[index]["text"]) == index % 3000 for index in found)
    assert len(said) == len({*said}), "no row was written twice"


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with store.writer(0) as writer, open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writer._descriptor)
        with pytest.raises(OSError, match="No space left on device") as caught:
            writer.append([row(1)])
    assert caught.value.filename == str(store.folder / "rows-rank0.jsonl")
