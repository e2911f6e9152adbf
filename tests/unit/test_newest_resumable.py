import torch
from safetensors.torch import save_file

from adakron.checkpoint import TENSORS_FILE, newest_resumable
from adakron.engine.state import KINDS
from adakron.store import CheckpointStore
from tests.unit.launch.test_resuming import save


def test_the_newest_resumable_checkpoint_is_whole_and_finite(tmp_path):
    assert newest_resumable(tmp_path).checkpoint is None
    for step in (9, 20, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoint-30" / TENSORS_FILE).write_bytes((tmp_path / "checkpoint-9" / TENSORS_FILE).read_bytes())
    store = CheckpointStore(tmp_path)
    for step, value in ((100, float("inf")), (101, float("nan"))):
        tensors = {f"{kind}/a": torch.tensor([value]) for kind in KINDS}

        def fill(target, tensors=tensors):
            for file in (tmp_path / "checkpoint-20").glob("*.json"):
                if file.name != "manifest.json":
                    (target / file.name).write_bytes(file.read_bytes())
            save_file(tensors, target / TENSORS_FILE)

        store.write(step, fill)
    store.write(103, lambda target: (target / "other").touch())
    (tmp_path / "checkpoint-104").mkdir()
    (tmp_path / "checkpoint-new").mkdir()
    found = newest_resumable(tmp_path)
    assert found.checkpoint == tmp_path / "checkpoint-20"
    assert found.saved.snapshot.step == 20
    assert [path.name for path in found.rejected] == [f"checkpoint-{step}" for step in (104, 103, 101, 100, 30)]
    assert all("finite" in found.rejected[tmp_path / f"checkpoint-{step}"] for step in (100, 101))
