import torch
from safetensors.torch import save_file

from adakron.adapter_folder import WEIGHTS_FILE
from adakron.store import CheckpointStore
from launch.recording import last_good_checkpoint


def test_the_last_good_checkpoint_is_the_newest_that_is_whole_and_finite(tmp_path):
    assert last_good_checkpoint(tmp_path) is None
    store = CheckpointStore(tmp_path)
    for step, value in ((9, 1.0), (20, 2.0), (30, 3.0), (100, float("inf")), (101, float("nan"))):
        tensors = {"a": torch.tensor([0.0, value]), "b": torch.tensor([1])}
        store.write(step, lambda folder, tensors=tensors: save_file(tensors, folder / WEIGHTS_FILE))
    (tmp_path / "checkpoint-30" / WEIGHTS_FILE).write_bytes((tmp_path / "checkpoint-9" / WEIGHTS_FILE).read_bytes())
    store.write(102, lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"half"))
    store.write(103, lambda folder: (folder / "other").touch())
    (tmp_path / "checkpoint-104").mkdir()
    (tmp_path / "checkpoint-new").mkdir()
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
