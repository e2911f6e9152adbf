import os

import pytest
import torch
from safetensors.torch import save_file

from adakron.errors import CheckpointError
from adakron.tensor_file import read_tensor_file


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
