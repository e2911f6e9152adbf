import json
import os
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adakron.dumps import StepDump, read_dump, write_dump
from adakron.errors import CheckpointError
from adakron.passes import ForwardPass, MicroBatchLoss
from adakron.replay import replay
from tests.unit.test_trainer import CountingTask


class Sum(CountingTask):
    """The loss is the sum of what the model gives."""

    def loss(self, forward, batch):
        outputs = forward(batch["inputs"])
        return outputs.sum(), outputs


def dump(*inputs: list[float], parameters: dict[str, torch.Tensor] | None = None) -> StepDump:
    places = [ForwardPass(4, index, 0, np.array([index + 10]), filler=index == 1) for index in range(len(inputs))]
    batches = [{"inputs": torch.tensor([row]), "labels": torch.tensor([index])} for index, row in enumerate(inputs)]
    return StepDump(5, 1, 2, 3, places, batches, parameters or {}, {"config": {"a": [1, None]}, "precision": "bf16"})


def test_a_dump_comes_back_as_it_was(tmp_path):
    written = dump([1.0, 2.0], [3.0, float("nan")], parameters={"a.weight": torch.arange(3.0), "b": torch.tensor(float("inf"))})
    file = tmp_path / written.name
    write_dump(written, file)
    assert file.name == "nonfinite-step5-rank1.safetensors"
    found = read_dump(file)
    assert (found.number, found.rank, found.world_size, found.targets, found.run) == (5, 1, 2, 3, written.run)
    for mine, theirs in zip(found.places, written.places, strict=True):
        assert (mine.step, mine.micro_step, mine.index, mine.filler) == (theirs.step, theirs.micro_step, theirs.index, theirs.filler)
        assert mine.examples.tolist() == theirs.examples.tolist()
    assert found.parameters.keys() == written.parameters.keys()
    assert torch.equal(found.batches[1]["inputs"], written.batches[1]["inputs"]) is False  # a NaN equals nothing
    torch.testing.assert_close(found.batches, written.batches, equal_nan=True)
    torch.testing.assert_close(dict(found.parameters), dict(written.parameters))


def test_another_file_is_one_clear_error(tmp_path):
    for name, metadata in (("plain", None), ("future", {"adakron_step": json.dumps({"format": 9})})):
        save_file({"x": torch.zeros(1)}, tmp_path / name, metadata=metadata)
    for name, content in (("list", [1]), ("short", {"format": 1}), ("places", {"format": 1, "places": 3})):
        save_file({"x": torch.zeros(1)}, tmp_path / name, metadata={"adakron_step": json.dumps(content)})
    (tmp_path / "text").write_text("no tensors")
    os.mkfifo(tmp_path / "pipe")
    others = [(name, "not a step") for name in ("plain", "text", "none", "short", "places", "pipe")]
    for name, said in (*others, ("future", "format is 9"), ("list", r"format is \[1\]")):
        with pytest.raises(CheckpointError, match=said):
            read_dump(tmp_path / name)


def test_a_full_disk_leaves_no_file_and_an_error_of_the_system(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="large"):
            write_dump(dump([1.0, 2.0], parameters={"a": torch.zeros(10_000)}), tmp_path / "dump")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(0.5)
    return layers


def found(layers: nn.Module, step: StepDump) -> list[str]:
    return replay(layers, MicroBatchLoss(layers, Sum()), step, torch.device("cpu"))


def test_a_finite_step_is_not_reproduced():
    assert found(model(), dump([1.0, 2.0], [3.0, 4.0])) == []


def test_the_first_module_that_is_not_finite_is_named():
    layers = model()
    with torch.no_grad():
        layers[2].weight.fill_(1e38)
    # tanh(50.5) is 1, twice 1e38 is finite, 1e39 is not.
    layers[2].weight.data *= 3
    said = found(layers, dump([1.0, 2.0], [100.0, 100.0]))
    assert said[0].startswith("micro-batch 0: in the forward pass the output of 2 (Linear) is the first")
    assert "micro-batch 0: the loss is inf" in said


def test_a_gradient_that_is_not_finite_behind_a_finite_loss():
    class Root(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.abs().sqrt()

    layers = nn.Sequential(nn.Linear(2, 2), Root())
    for parameter in layers.parameters():
        nn.init.zeros_(parameter)
    said = found(layers, dump([1.0, 2.0]))
    assert said[0].startswith("micro-batch 0: in the backward pass the gradient after 0 is the first")
    assert "gradient of 0.weight is not finite, as are those of 1 more of 2" in said[-1]


def test_a_poisoned_parameter_is_named_first():
    layers = model()
    layers[0].bias.data[1] = float("nan")
    assert found(layers, dump([1.0, 2.0]))[0] == "parameter 0.bias is not finite before anything is computed"
