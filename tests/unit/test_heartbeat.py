"""What `heartbeat.json` says, and when it is written."""

import json
import shutil
import threading

from adakron import heartbeat
from adakron.heartbeat import Heartbeat
from adakron.stragglers import Straggler


def read(file):
    return json.loads(file.read_text())


def test_it_says_where_the_run_is(tmp_path):
    file = tmp_path / "heartbeat.json"
    beat = Heartbeat(file, 100, ["n1", "n2"])
    assert (read(file)["doing"], read(file)["step"], read(file)["max_steps"], read(file)["ranks"]) == ("starting", 0, 100, 2)
    assert read(file)["straggler_rank"] is None
    beat.step(7)
    beat.logged(0.25, 0.5, Straggler(1, 0.125, 0.3))
    beat.doing("saving")
    said = read(file)
    assert (said["doing"], said["step"], said["loss"], said["seconds_per_step"]) == ("saving", 7, 0.25, 0.5)
    assert (said["straggler_rank"], said["straggler_host"], said["straggler_seconds"]) == (1, "n2", 0.125)
    assert said["last_step_at"] <= said["last_progress_at"] <= said["written_at"]


def test_steps_are_written_now_and_then_and_what_it_does_at_once(tmp_path, monkeypatch):
    file = tmp_path / "heartbeat.json"
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    beat = Heartbeat(file, 100, ["n1"])
    beat.doing("training")
    beat.step(1)
    assert read(file)["step"] == 0
    now[0] += heartbeat.EVERY_SECONDS
    beat.step(2)
    assert read(file)["step"] == 2
    beat.step(3)
    beat.doing("evaluating")
    assert (read(file)["step"], read(file)["doing"]) == (3, "evaluating")
    before = read(file)["last_progress_at"]
    now[0] += heartbeat.EVERY_SECONDS
    beat.progress()  # a long evaluation is no stall
    assert read(file)["last_progress_at"] >= before
    assert read(file)["step"] == 3


def test_other_ranks_write_nothing_and_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    Heartbeat().doing("training")
    beat = Heartbeat(tmp_path / "heartbeat.json", 1, ["n1"])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    write = heartbeat.write_json
    monkeypatch.setattr(heartbeat, "write_json", full)
    said: list[str] = []
    monkeypatch.setattr(heartbeat.logger, "warning", lambda text, *values: said.append(text % values))
    beat.doing("training")
    beat.doing("evaluating")
    assert read(tmp_path / "heartbeat.json")["doing"] == "starting"
    monkeypatch.setattr(heartbeat, "write_json", write)
    beat.doing("finished")
    assert read(tmp_path / "heartbeat.json")["doing"] == "finished"  # there was room again
    assert said == [f"{tmp_path / 'heartbeat.json'} could not be written (No space left on device); it says where the run was before"]


def test_a_folder_that_was_deleted_does_not_come_back(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    beat = Heartbeat(folder / "heartbeat.json", 1, ["n1"])
    shutil.rmtree(folder)
    beat.doing("failed")
    assert not folder.exists()  # with a heartbeat alone it would be no run's, and no run could have it


def test_a_run_that_goes_on_begins_where_it_stood_and_a_folder_that_hangs_does_not_hold_up_its_end(tmp_path, monkeypatch):
    beat = Heartbeat(tmp_path / "heartbeat.json", 100, ["n1"], step=40)
    assert read(tmp_path / "heartbeat.json")["step"] == 40
    released = threading.Event()
    monkeypatch.setattr(heartbeat, "LAST_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "write_json", lambda *_, **__: released.wait(60))
    beat.failed()  # returns
    released.set()
