import torch
from safetensors.torch import save_file

from adakron.adapter_folder import WEIGHTS_FILE
from launch.recording import last_good_checkpoint


def test_the_last_good_checkpoint_is_the_newest_that_is_whole_and_finite(tmp_path):
    assert last_good_checkpoint(tmp_path) is None
    for step, value in ((9, 1.0), (20, 2.0), (100, float("inf")), (101, float("nan"))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.tensor([0.0, value]), "b": torch.tensor([1])}, folder / WEIGHTS_FILE)
    (tmp_path / "checkpoint-102").mkdir()
    (tmp_path / "checkpoint-102" / WEIGHTS_FILE).write_bytes(b"half")
    (tmp_path / "checkpoint-103").mkdir()
    (tmp_path / "checkpoint-new").mkdir()
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
