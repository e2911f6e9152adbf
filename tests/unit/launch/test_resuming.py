import contextlib
import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adakron import distributed, run_folder
from adakron.checkpoint import TRAINING_STATE_FILE, read_training_state, write_training_state
from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.engine.state import KINDS, EngineState
from adakron.errors import CheckpointError, ConfigError
from adakron.store import CheckpointStore
from adakron.train_state import Due, RankState, Snapshot, Sums, TrainState, random_states
from launch.recording import claim_folder
from launch.resuming import (
    MAY_CHANGE,
    Resumption,
    check_agreement,
    check_same,
    described_start,
    find,
    stopped_early_message,
    stopped_message,
)
from launch.saved_run import check_trust
from tests.helpers.launch import ROOT


def test_a_resumption_says_where_it_begins_and_what_is_another_now():
    begun_anew = Resumption(None, None, in_place=True, finished=False, run={})
    assert described_start(begun_anew, {"stage": 2}) == "the run has no checkpoint yet: it begins anew"
    before = {"layout": {"world_size": 2, "stage": 2, "precision": "bf16"}}
    gone_on = Resumption(Path("r/checkpoint-0"), None, in_place=True, finished=False, run=before)
    said = described_start(gone_on, {"world_size": 1, "stage": 2, "precision": "fp32"})
    assert said == "goes on from r/checkpoint-0 (step 0); world size 2 -> 1; precision bf16 -> fp32"


def test_a_stop_before_training_says_what_it_did():
    assert stopped_early_message("max_hours 0.1").startswith("stopped by max_hours 0.1 before training began; nothing was written")


def test_a_file_cannot_ask_for_foreign_code():
    asking = ModelConfig(model_name_or_path="some/model", trust_remote_code=True)
    with pytest.raises(CheckpointError, match=r"dump\.safetensors says .*--trust_remote_code"):
        check_trust(asking, "dump.safetensors", trusted=False)
    check_trust(asking, "dump.safetensors", trusted=True)
    check_trust(ModelConfig(), "dump.safetensors", trusted=False)


def config_of(folder: Path) -> RunConfig:
    training = TrainingConfig(output_dir=str(folder), resume_from_checkpoint="auto")
    return RunConfig(model=ModelConfig(), adapter=AdapterConfig(), data=DataConfig(), training=training, deepspeed="x.json")


def test_a_folder_whose_run_was_killed_while_it_took_it_is_begun_anew(tmp_path):
    run_folder.claim(tmp_path / "run", overwrite=False).release()
    config, resumption = find(config_of(tmp_path / "run"))
    assert resumption is None
    assert (config.training.overwrite_output_dir, config.training.resume_from_checkpoint) == (True, None)
    run_folder.claim(tmp_path / "run", overwrite=True).release()


def snapshot(step: int) -> Snapshot:
    kinds = {kind: {"a": torch.tensor([float(step)])} for kind in KINDS}
    rank = RankState(random_states(torch.device("cpu")), {}, {"window": [], "pending": []})
    return Snapshot(EngineState(kinds, {"a": step}, step, 0), TrainState(), Sums(), Due(), None, None, None, [rank])


def save(folder: Path, step: int) -> Path:
    CheckpointStore(folder).write(step, lambda target: write_training_state(target, snapshot(step), {"config": {}}))
    return folder / f"checkpoint-{step}"


def resumption(checkpoint: Path | None, *, in_place: bool, finished: bool = False, run: Mapping[str, Any] | None = None) -> Resumption:
    saved = read_training_state(checkpoint) if checkpoint else None
    return Resumption(checkpoint, saved, in_place, finished, run or {})


SETTINGS = DeepSpeedSettings({}, 2, "fp32")
LAYOUT = {"world_size": 1, "stage": 2, "precision": "fp32"}


def test_a_run_that_went_on_meanwhile_is_not_written_over(tmp_path):
    run_folder.claim(tmp_path, overwrite=False).release()
    run_folder.write_json(tmp_path / run_folder.RUN_FILE, {"config": {}, "command": ["first"]})
    five = save(tmp_path, 5)
    read_at_five = resumption(five, in_place=True)
    eight = save(tmp_path, 8)
    with contextlib.ExitStack() as held, pytest.raises(CheckpointError, match=r"went on to step 8 after this run had read step 5"):
        claim_folder(config_of(tmp_path), SETTINGS, LAYOUT, held, read_at_five)
    with contextlib.ExitStack() as held:
        assert claim_folder(config_of(tmp_path), SETTINGS, LAYOUT, held, resumption(eight, in_place=True)) == tmp_path
    # One that `find` passed over is no other run's.
    (eight / TRAINING_STATE_FILE).write_text("{}")
    with contextlib.ExitStack() as held:
        claim_folder(config_of(tmp_path), SETTINGS, LAYOUT, held, read_at_five)
    record = run_folder.read_run(tmp_path)
    assert record["command"] == ["first"]
    assert [entry["checkpoint"] for entry in record["resumed"]] == [str(eight), str(five)]
    assert [(entry["step"], entry["world_size"], entry["stage"], entry["precision"]) for entry in record["resumed"]] == [
        (8, 1, 2, "fp32"), (5, 1, 2, "fp32"),
    ]  # fmt: skip


def test_a_run_that_goes_on_elsewhere_says_where_it_came_from(tmp_path):
    (tmp_path / "old").mkdir()
    five = save(tmp_path / "old", 5)
    with contextlib.ExitStack() as held:
        folder = claim_folder(config_of(tmp_path / "new"), SETTINGS, LAYOUT, held, resumption(five, in_place=False))
    (entry,) = run_folder.read_run(folder)["resumed"]
    assert (entry["step"], entry["checkpoint"]) == (5, str(five))


def test_what_another_run_wrote_since_is_not_replaced(tmp_path):
    config = config_of(tmp_path)
    anew = dataclasses.replace(config.training, resume_from_checkpoint=None, overwrite_output_dir=True)
    run_folder.claim(tmp_path, overwrite=False).release()
    run_folder.write_json(tmp_path / run_folder.RUN_FILE, {"config": {}})
    eight = save(tmp_path, 8)
    with contextlib.ExitStack() as held, pytest.raises(CheckpointError, match=r"went on to step 8 after this run had read step 0"):
        claim_folder(dataclasses.replace(config, training=anew), SETTINGS, LAYOUT, held, resumption(None, in_place=False))
    assert eight.is_dir()
    run_folder.write_json(tmp_path / run_folder.ALL_RESULTS_FILE, {})
    shutil.rmtree(eight)
    with contextlib.ExitStack() as held, pytest.raises(CheckpointError, match="was finished by another run"):
        claim_folder(dataclasses.replace(config, training=anew), SETTINGS, LAYOUT, held, resumption(None, in_place=False))
    assert (tmp_path / run_folder.ALL_RESULTS_FILE).exists()
    eight = save(tmp_path, 8)
    with contextlib.ExitStack() as held, pytest.raises(CheckpointError, match="was finished by another run"):
        claim_folder(config, SETTINGS, LAYOUT, held, resumption(eight, in_place=True))


def test_settings_that_differ_are_named_with_a_remedy_that_can_be_followed():
    before = {"config": {"training": {"seed": 1}, "data": {}, "model": {}, "adapter": {}}}
    now = {"config": {"training": {"seed": 2}, "data": {}, "model": {}, "adapter": {}}, "global_batch": 1, "data": {}}
    with pytest.raises(ConfigError, match=r"^r cannot be gone on with: seed was 1, .* give --seed as it was, or begin anew: --over"):
        check_same(resumption(None, in_place=False, run=before), now, "r")


def test_another_number_of_examples_per_step_is_refused_with_the_flag_that_keeps_it():
    config = {"training": {}, "data": {}, "model": {}, "adapter": {}}
    before, now = ({"config": config, "global_batch": count, "data": {}} for count in (48, 32))
    with pytest.raises(ConfigError, match=r"a step took 48 examples, it would take 32 now; give --global_batch_size 48"):
        check_same(resumption(None, in_place=False, run=before), now, "r")


def test_a_stop_in_an_evaluation_says_so():
    trainer = SimpleNamespace(step=4, total_steps=9, owes_evaluation=True)
    said = stopped_message("SIGTERM", trainer, Path("runs/a"))
    assert said == "stopped by SIGTERM in the evaluation at step 4 of 9; to go on, add --resume_from_checkpoint runs/a"


def test_ranks_that_see_a_finished_run_and_ranks_that_do_not_end_alike(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_object", lambda mine: [mine, (0, False), None])
    with pytest.raises(CheckpointError, match=r"by rank: step 0, finished; step 0; nothing"):
        check_agreement(Resumption(None, None, in_place=True, finished=True, run={}))


def test_a_stop_before_the_first_step_says_that_the_folder_is_taken_and_how_to_begin_there():
    trainer = SimpleNamespace(step=0, total_steps=9, owes_evaluation=False)
    said = stopped_message("SIGTERM", trainer, Path("runs/a"))
    assert said.endswith("runs/a is this run's now; to begin there after all, add --output_dir runs/a --resume_from_checkpoint auto")


def test_the_documentation_lists_what_may_change():
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = text[text.index("| what | flags |") : text.index("A finished run cannot be extended")]
    said = {word for quoted in re.findall(r"`([a-z0-9_ ]+)`", table) for word in quoted.split()}
    assert said == set().union(*MAY_CHANGE.values())
