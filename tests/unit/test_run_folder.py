import json
import os

import pytest

from adakron import atomic, run_folder
from adakron.errors import CheckpointError, ConfigError
from adakron.run_lock import LOCK_FILE, RunLock
from adakron.store import CheckpointStore


def make_run(folder):
    folder.mkdir()
    run_folder.write_json(folder / run_folder.RUN_FILE, {"config": {}})
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "adapter_config.json").write_text("{}")


def test_a_missing_or_empty_folder_is_free(tmp_path):
    run_folder.check_free(tmp_path / "a" / "b", overwrite=False)
    run_folder.check_free(tmp_path, overwrite=False)


def test_a_run_is_never_overwritten_unasked(tmp_path):
    make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"already holds a run.*--overwrite_output_dir"):
        run_folder.check_free(tmp_path / "run", overwrite=False)
    assert (tmp_path / "run" / "checkpoint-3" / "adapter_config.json").exists()


def test_overwriting_replaces_a_run_whole(tmp_path):
    make_run(tmp_path / "run")
    run_folder.claim(tmp_path / "run", overwrite=True).release()
    CheckpointStore(tmp_path / "run").write(7, lambda folder: (folder / "a").touch())
    for leftover in (".checkpoint-8.staging", ".checkpoint-9.replaced", ".checkpoint-1.deleted"):
        (tmp_path / "run" / leftover).mkdir()
    (tmp_path / "run" / ".latest.77.partial").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint-6").write_text("no folder: mine")
    (tmp_path / "run" / "notes.md").write_text("mine")
    for name in ("nonfinite-step3-rank0.safetensors", "nonfinite-step3-rank0-2.safetensors"):
        (tmp_path / "run" / name).write_text("")
    (tmp_path / "run" / "data").mkdir()
    run_folder.write_json(tmp_path / "run" / run_folder.HEARTBEAT_FILE, {})
    (tmp_path / "run" / "logs").mkdir()
    run_folder.rank_log(tmp_path / "run", 11).write_text("")
    run_folder.check_free(tmp_path / "run", overwrite=True)
    run_folder.claim(tmp_path / "run", overwrite=True).release()
    # ... and nothing but the run.
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {run_folder.RUN_FILE, LOCK_FILE, "notes.md", "data", "checkpoint-6"} and (tmp_path / "elsewhere").is_dir()


def test_overwriting_takes_the_ranks_logs_and_nothing_else_in_that_folder(tmp_path):
    make_run(tmp_path / "run")
    logs = tmp_path / "run" / "logs"
    logs.mkdir()
    run_folder.rank_log(tmp_path / "run", 0).write_text("")
    (logs / "slurm.out").write_text("mine")
    run_folder.claim(tmp_path / "run", overwrite=True).release()
    assert [log.name for log in logs.iterdir()] == ["slurm.out"]


def test_a_folder_of_somebody_else_is_not_deleted_even_when_asked(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="replaces runs only"):
        run_folder.check_free(tmp_path, overwrite=True)


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run_folder.check_free(tmp_path / "file", overwrite=True)


def test_write_json_leaves_no_partial_file(tmp_path, monkeypatch):
    with pytest.raises(TypeError):
        run_folder.write_json(tmp_path / "a.json", {"bad": object()})
    assert list(tmp_path.iterdir()) == []
    run_folder.write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run_folder.write_json(tmp_path / "a.json", {"x": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_damaged_run_file_is_one_clear_error(tmp_path, content):
    if content is not None:
        (tmp_path / run_folder.RUN_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        run_folder.read_run(tmp_path)


def test_a_folder_taken_since_the_check_is_left_alone(tmp_path):
    run_folder.check_free(tmp_path / "run", overwrite=False)
    make_run(tmp_path / "run")  # another job was faster
    with pytest.raises(ConfigError, match="already holds a run"):
        run_folder.claim(tmp_path / "run", overwrite=False)
    assert (tmp_path / "run" / "checkpoint-3" / "adapter_config.json").exists()


def test_default_names_never_collide(tmp_path):
    claimed = [run_folder.claim_new(tmp_path / "runs" / "same-second") for _ in range(3)]
    assert [folder.name for folder, _ in claimed] == ["same-second", "same-second-2", "same-second-3"]
    for folder, lock in claimed:
        with pytest.raises(ConfigError, match=f"being written by process {os.getpid()} on"):
            run_folder.check_free(folder, overwrite=True)
        lock.release()
        run_folder.check_free(folder, overwrite=True)


def test_a_removal_that_was_killed_is_taken_up_again(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    with monkeypatch.context() as killed:
        killed.setattr(run_folder.shutil, "rmtree", lambda path: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run_folder.claim(tmp_path / "run", overwrite=True)
    run_folder.claim(tmp_path / "run", overwrite=True).release()
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_a_start_that_was_killed_after_locking_leaves_a_free_folder(tmp_path):
    RunLock(tmp_path).release()
    run_folder.claim(tmp_path, overwrite=False).release()


def test_what_killed_runs_left_half_written_goes_and_nothing_else(tmp_path):
    mine = {".notes.md.7.partial", ".run.json.partial", "run.json"}
    for name in (*mine, ".run.json.7.partial", ".metrics.jsonl.81.partial", ".nonfinite-step3-rank0.safetensors.7.partial"):
        (tmp_path / name).touch()
    run_folder.remove_partials(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == mine


def test_a_free_name_overwrites_nothing(tmp_path):
    file = tmp_path / "step.bin"
    names = []
    for _ in range(3):
        names.append(run_folder.free_name(file))
        names[-1].write_text("")
    assert [name.name for name in names] == ["step.bin", "step-2.bin", "step-3.bin"]


def test_a_folder_that_a_run_is_writing_is_said_to_be_so_before_anything_else(tmp_path):
    make_run(tmp_path / "run")
    with RunLock(tmp_path / "run"):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="is being written by process"):
                run_folder.check_free(tmp_path / "run", overwrite=overwrite)
