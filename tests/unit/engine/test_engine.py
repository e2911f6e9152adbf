import math

import pytest
import torch
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from adakron.config import TrainingConfig
from adakron.engine.ds_config import RunValues, resolve
from adakron.engine.engine import TrainingEngine
from adakron.engine.optimizer import schedule_factor, warmup_steps
from adakron.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0, 0.0]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_by_hand(kind, expected):
    assert [schedule_factor(kind, step, warmup=2, total=6) for step in range(8)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (3, 10), (10, 10), (15, 10)])
def test_schedules_are_those_of_transformers(warmup, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = {
        "linear": get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "constant": get_constant_schedule_with_warmup(optimizer, warmup),
    }
    for kind, scheduler in theirs.items():
        for step in range(total):
            assert schedule_factor(kind, step, warmup, total) == pytest.approx(scheduler.lr_lambdas[0](step), abs=1e-15), (kind, step)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_nothing_is_learned_after_the_end_of_a_schedule(kind):
    assert schedule_factor(kind, 25, warmup=2, total=10) == 0.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 7),  # 0.06 of 101 steps is 6.06: rounded up
        ({"warmup_ratio": 0.0}, 0),
        ({"warmup_ratio": 1.0}, 101),
        ({"warmup_steps": 5, "warmup_ratio": 0.5}, 5),
    ],
)
def test_warmup_in_steps(settings, expected):
    assert warmup_steps(TrainingConfig(**settings), 101) == expected


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    layers[0].requires_grad_(False)
    return layers


def build(layers: nn.Module, groups: list[dict[str, list[nn.Parameter]]]) -> None:
    settings = resolve({}, RunValues(micro_batch=1, accumulation=1, world_size=1, max_grad_norm=1.0))
    TrainingEngine(layers, groups, settings, TrainingConfig(), total_steps=1, device=torch.device("cpu"))


def test_a_group_that_misses_a_trainable_parameter_is_an_error():
    layers = model()
    with pytest.raises(ConfigError, match=r"got 1 for 2, missing \['1.bias'\]"):
        build(layers, [{"params": [layers[1].weight]}])


def test_a_frozen_parameter_in_a_group_is_an_error():
    layers = model()
    with pytest.raises(ConfigError, match="got 4 for 2"):
        build(layers, [{"params": list(layers.parameters())}])


def test_a_parameter_in_two_groups_is_an_error():
    layers = model()
    with pytest.raises(ConfigError, match="each once; got 3 for 2"):
        build(layers, [{"params": list(layers[1].parameters())}, {"params": [layers[1].bias]}])


def test_a_frozen_model_is_an_error():
    layers = model().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing trains"):
        build(layers, [])
