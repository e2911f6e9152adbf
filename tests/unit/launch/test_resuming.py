from pathlib import Path

import pytest

from adakron.config import ModelConfig
from adakron.errors import CheckpointError
from launch.resuming import Resumption, described_start, stopped_early_message
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
