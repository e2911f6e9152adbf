"""`launch/checkpoints.py`: what it shows, what it deletes, and its exit codes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adakron.errors import CheckpointError, ConfigError
from adakron.launcher import World
from adakron.manifest import MANIFEST_FILE, write_manifest
from adakron.run_lock import LOCK_FILE, RunLock
from adakron.store import CheckpointStore
from launch import checkpoints
from tests.helpers.launch import python
from tests.unit.launch.test_resuming import save

SCORES = {10: 0.5, 20: 0.9, 30: 0.75}
NO_STATE = "cannot be resumed from: it has no training_state.json; name a checkpoint-<step> folder of a training run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    store = CheckpointStore(folder)
    history: list[dict[str, Any]] = []
    for step, score in SCORES.items():
        history += [{"step": step, "loss": 0.3}, {"step": step, "eval_accuracy": score}]
        best = max(done for done in SCORES if done <= step and SCORES[done] == max(SCORES[d] for d in SCORES if d <= step))
        state = {"best_step": best, "metric_for_best_model": "accuracy", "log_history": history}

        def fill(place: Path, state: dict[str, Any] = state) -> None:
            (place / "trainer_state.json").write_text(json.dumps(state))
            (place / "adapter_model.safetensors").write_bytes(b"x" * 101_800)

        store.write(step, fill)
    return folder


def main(*arguments: str | Path) -> int:
    return checkpoints.main([str(argument) for argument in arguments], World())


def damage(run: Path, step: int) -> None:
    os.truncate(run / f"checkpoint-{step}" / "adapter_model.safetensors", 100)


def test_ls_shows_steps_scores_marks_and_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 30)
    assert main("ls", run) == 0
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["step", "KiB", "eval_accuracy", "marks", "state"],
        ["10", "100", "0.5000", "-", f"good, but {NO_STATE}"],
        ["20", "100", "0.9000", "best", f"good, but {NO_STATE}"],
        ["30", "1", "-", "latest", "bad: adapter_model.safetensors has 100 bytes, and was written with 101,800"],
    ]
    assert [path.name for path in run.glob(".*")] == []


def test_the_one_to_resume_from_is_marked_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):  # whole, by the manifest, and yet nothing to go on from
        (tmp_path / f"checkpoint-{step}" / "training_state.json").write_text("{}")
        (tmp_path / f"checkpoint-{step}" / MANIFEST_FILE).unlink()
        write_manifest(tmp_path / f"checkpoint-{step}")
    assert main("ls", tmp_path) == 0
    lines = [line.split(maxsplit=4)[3:] for line in capsys.readouterr().out.splitlines()]
    assert [marks for marks, _ in lines] == ["marks", "resume", "-", "latest"]
    assert [state.split("(")[0] for _, state in lines[1:]] == [
        "good",
        *["good, but cannot be resumed from: its training state is damaged "] * 2,
    ]
    assert main("verify", tmp_path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [one["unresumable"] is None for one in shown] == [True, False, False] and all(one["good"] for one in shown)
    assert main("prune", tmp_path, "--keep", "1") == 0
    assert capsys.readouterr().out == "deleted checkpoint-20\n"


def test_a_checkpoint_in_place_of_its_run_is_told_apart(run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint-20 is a checkpoint; name the run that it belongs to: {run}$"):
        main("ls", run / "checkpoint-20")
    (run / "checkpoint-20" / MANIFEST_FILE).unlink()  # half-written, or of an older version: the more one wants to look
    with pytest.raises(ConfigError, match="is a checkpoint"):
        main("verify", run / "checkpoint-20")
    # A run may have such a name.
    run.rename(run.with_name("checkpoint-1"))
    assert main("ls", run.with_name("checkpoint-1")) == 0


def test_verify_tells_all_damage_by_its_exit_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("verify", run) == 0
    good = [line for step in SCORES for line in (f"checkpoint-{step}: good", f"  - {NO_STATE}")]
    assert capsys.readouterr().out.splitlines() == good
    damage(run, 20)
    (run / "checkpoint-20" / "trainer_state.json").unlink()
    assert main("verify", run) == 1
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "checkpoint-20: bad",
        "  - adapter_model.safetensors has 100 bytes, and was written with 101,800",
        "  - trainer_state.json is missing",
    ]


HUGE = '{"metric_for_best_model": "x", "log_history": [{"step": 20, "eval_x": 1' + "0" * 400 + "}]}"


@pytest.mark.parametrize("state", ['{"log_history": 3}', '{"log_history": [3]}', '{"log_history": null}', "[]", "{", "[" * 9999, HUGE])
def test_one_odd_state_does_not_end_a_listing(run: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    (run / "checkpoint-20" / "trainer_state.json").write_text(state)
    (run / "checkpoint-20" / MANIFEST_FILE).unlink()
    write_manifest(run / "checkpoint-20")
    assert main("ls", run) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["10", "20", "30"] and lines[1][2] == "-"


def test_what_a_state_says_cannot_end_the_listing_nor_write_to_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoint-20")
    history = ["odd", {"step": 20, "eval_a\x1b[2J": float("nan")}]
    state = json.dumps({"metric_for_best_model": "a\x1b[2J", "log_history": history})
    CheckpointStore(run).write(20, lambda place: (place / "trainer_state.json").write_text(state))
    for step in (10, 30):
        damage(run, step)
    for name in ("trainer_state.json", "latest"):  # nobody writes into these pipes: to read them is to wait for ever
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    assert main("ls", run) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["eval_a\\x1b[2J", "-", "nan", "-"]
    assert main("ls", run, "--json") == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["checkpoints"][1]["value"] is None


def test_json_holds_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 10)
    assert main("verify", run, "--json") == 1
    verified = json.loads(capsys.readouterr().out)
    assert main("ls", run, "--json") == 0
    assert verified == json.loads(capsys.readouterr().out)
    assert verified["checkpoints"][0]["problems"] == ["adapter_model.safetensors has 100 bytes, and was written with 101,800"]
    size = sum(path.stat().st_size for path in (run / "checkpoint-30").iterdir())
    assert verified["checkpoints"][2] == {
        "step": 30, "name": "checkpoint-30", "bytes": size, "metric": "eval_accuracy", "value": 0.75, "marks": ["latest"], "good": True,
        "problems": [], "unresumable": f"{run}/checkpoint-30 {NO_STATE}",
    }  # fmt: skip


def test_a_run_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("ls", tmp_path) == 0 and main("verify", tmp_path) == 1 and main("prune", tmp_path, "--keep", "1") == 0
    assert capsys.readouterr().out == f"{tmp_path} holds no checkpoint\n" * 2 + "nothing to delete\n"
    assert list(tmp_path.iterdir()) == []


def test_prune_keeps_the_best_and_first_says_what_it_would_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("prune", run, "--keep", "1", "--dry_run") == 0
    assert capsys.readouterr().out == "would delete checkpoint-10\n"
    assert len(list(run.glob("checkpoint-*"))) == 3 and not (run / LOCK_FILE).exists()
    assert main("prune", run, "--keep", "1") == 0
    assert capsys.readouterr().out == "deleted checkpoint-10\n"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-30"]
    # A finished run knows better which is best than its last checkpoint does.
    (run / "trainer_state.json").write_text('{"best_step": 30}')
    assert main("prune", run, "--keep", "1") == 0
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-30"]


def test_prune_deletes_nothing_where_it_cannot_know(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(run), pytest.raises(ConfigError, match=r"is being written by process .*; wait for it, or end it$"):
        main("prune", run, "--keep", "1")
    with pytest.raises(ConfigError, match="keep is 0"):
        main("prune", run, "--keep", "0")
    (run / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match="says which checkpoint is the best"):
        main("prune", run, "--keep", "1")
    assert len(list(run.glob("checkpoint-*"))) == 3
    # ... but it hides nothing from a reader.
    assert main("ls", run) == 0 and main("verify", run) == 0
    assert "best" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "command"),
        (("list",), "invalid choice: 'list'"),
        (("ls", "none"), "none is no folder"),
        (("prune", "."), "--keep"),
        (("ls", ".", "--jsn"), r"ls takes no --jsn; did you mean --json\?"),
        (("prune", ".", "--keep", "1", "--dry-run"), r"prune takes no --dry-run; did you mean --dry_run\?"),
        (("ls", ".", "--keep", "1"), "ls takes no --keep; --help"),
        (("ls", ".", "other"), "ls takes no other; --help"),
        (("prune", ".", "--keep", "x"), "invalid int value"),
    ],
)
def test_wrong_commands_are_one_error(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(*arguments)


def test_the_program_itself(run: Path) -> None:
    damage(run, 20)
    finished = python("launch/checkpoints.py", "verify", str(run))
    assert finished.returncode == 1 and "checkpoint-20: bad" in finished.stdout, finished.output
    finished = python("launch/checkpoints.py", "verify", str(run / "none"))
    assert finished.returncode == 2 and finished.stderr.startswith("error: "), finished.output
