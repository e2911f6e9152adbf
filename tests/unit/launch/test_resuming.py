import contextlib
from pathlib import Path

import pytest

from adakron import distributed, run_folder
from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.errors import CheckpointError
from adakron.store import CheckpointStore
from launch.recording import claim_folder
from launch.resuming import Resumption, check_agreement, check_unchanged, described_start, find, stopped_early_message, stopped_message
from launch.saved_run import check_trust


def test_a_resumption_says_where_it_begins_and_what_is_another_now():
    begun_anew = Resumption(None, None, in_place=True, finished=False, run={})
    assert described_start(begun_anew, {"stage": 2}) == "the run has no checkpoint yet: it begins anew"
    before = {"layout": {"world_size": 2, "stage": 2, "precision": "bf16"}}
    resumption = Resumption(Path("r/checkpoint-0"), None, in_place=True, finished=False, run=before)
    said = described_start(resumption, {"world_size": 1, "stage": 2, "precision": "fp32"})
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


def test_a_run_that_went_on_meanwhile_is_not_written_over(tmp_path):
    run_folder.claim(tmp_path, overwrite=False).release()
    run_folder.write_json(tmp_path / run_folder.RUN_FILE, {"config": {}})
    CheckpointStore(tmp_path).write(8, lambda folder: (folder / "x").write_text("x"))
    settings = DeepSpeedSettings({}, 2, "fp32")
    with contextlib.ExitStack() as held, pytest.raises(CheckpointError, match=r"went on to step 8 after this run had read step 5"):
        claim_folder(config_of(tmp_path), settings, held, resumed_at=5)
    run_folder.RunLock(tmp_path).release()
    with contextlib.ExitStack() as held:
        assert claim_folder(config_of(tmp_path), settings, held, resumed_at=8) == tmp_path


def test_what_another_run_wrote_since_is_not_replaced(tmp_path):
    begun = Resumption(None, None, in_place=False, finished=False, run={})
    gone_on = Resumption(tmp_path / "checkpoint-8", None, in_place=True, finished=False, run={})
    check_unchanged(begun, tmp_path)
    check_unchanged(gone_on, tmp_path)
    CheckpointStore(tmp_path).write(8, lambda folder: (folder / "x").write_text("x"))
    with pytest.raises(CheckpointError, match=r"got its first checkpoint, checkpoint-8, after"):
        check_unchanged(begun, tmp_path)
    run_folder.write_json(tmp_path / run_folder.ALL_RESULTS_FILE, {})
    with pytest.raises(CheckpointError, match="was finished by another run"):
        check_unchanged(gone_on, tmp_path)


def test_ranks_that_see_a_finished_run_and_ranks_that_do_not_end_alike(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_object", lambda mine: [mine, (0, False), None])
    with pytest.raises(CheckpointError, match=r"by rank: step 0, finished; step 0; nothing"):
        check_agreement(Resumption(None, None, in_place=True, finished=True, run={}))


def test_a_stop_before_the_first_step_says_that_the_folder_is_taken_and_how_to_begin_there():
    said = stopped_message("SIGTERM", 0, 9, Path("runs/a"))
    assert said.endswith("runs/a is this run's now; to begin there after all, add --output_dir runs/a --resume_from_checkpoint auto")
