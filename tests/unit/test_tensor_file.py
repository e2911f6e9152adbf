import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from adakron.errors import CheckpointError
from adakron.tensor_file import read_tensor_file, write_tensor_file


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.tensor([1.0, float("nan")]), "not finite, in x"),
        (torch.tensor([float("-inf")]), "not finite, in x"),
        (torch.tensor([1]), r"x \(int64\)"),
        (torch.tensor([1j]), r"x \(complex64\)"),
    ],
)
def test_values_that_no_training_leaves(tensor, said, tmp_path):
    save_file({"x": tensor, "y": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=said):
        read_tensor_file(tmp_path / "a.safetensors")


def test_a_pipe_is_not_waited_for_and_halves_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_tensor_file(tmp_path / "pipe")
    save_file({"x": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    assert read_tensor_file(tmp_path / "a.safetensors")["x"].dtype == torch.bfloat16


def test_what_is_written_is_what_the_library_reads_and_everybody_may(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).T, "ü": torch.tensor(-0.0), "none": torch.ones(0, 2), "h": torch.randn(5).half(),
        "b": torch.randn(3).bfloat16(),
    }  # fmt: skip
    write_tensor_file(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].signbit(), tensor.signbit()) and torch.equal(read[name], tensor)
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
