import torch
from torch import nn

from adakron import weights


class Partitioned(nn.Parameter):
    """Empty, with what DeepSpeed hangs on a parameter that it took apart; counts its gatherings."""

    def __new__(cls, values: torch.Tensor) -> "Partitioned":
        parameter = super().__new__(cls, torch.empty(0))
        parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 0, values.shape, values.numel()
        parameter.values, parameter.gatherings = values, 0
        return parameter

    def all_gather(self, param_list: list["Partitioned"]) -> None:
        for parameter in param_list:
            parameter.data = parameter.values.clone()
            parameter.gatherings += 1

    def partition(self, param_list: list["Partitioned"], has_been_updated: bool) -> None:
        assert not has_been_updated
        for parameter in param_list:
            parameter.data = torch.empty(0)


VALUES = torch.arange(6.0).reshape(2, 3)


def test_a_partitioned_parameter_tells_its_shape_size_and_values():
    parameter = Partitioned(VALUES)
    assert weights.is_partitioned(parameter) and weights.shape(parameter) == (2, 3) and weights.size(parameter) == 6
    with weights.gathered([parameter]):
        assert torch.equal(parameter, VALUES)
    assert parameter.numel() == 0 and parameter.gatherings == 1


def test_a_whole_parameter_is_taken_as_it_is():
    parameter = nn.Parameter(VALUES.clone())
    assert not weights.is_partitioned(parameter) and weights.shape(parameter) == (2, 3) and weights.size(parameter) == 6
    with weights.gathered([parameter]):
        assert torch.equal(parameter, VALUES)
    assert torch.equal(parameter, VALUES)


def test_what_is_gathered_already_stays_so():
    outer, other = Partitioned(VALUES), Partitioned(VALUES + 1)
    with weights.gathered([outer]):
        with weights.gathered([outer, other, nn.Parameter(VALUES)]):
            assert torch.equal(other, VALUES + 1)
        assert torch.equal(outer, VALUES) and other.numel() == 0
    assert outer.numel() == 0 and outer.gatherings == 1


def test_a_failure_inside_leaves_nothing_gathered():
    parameter = Partitioned(VALUES)
    try:
        with weights.gathered([parameter]):
            raise KeyError
    except KeyError:
        pass
    assert parameter.numel() == 0
