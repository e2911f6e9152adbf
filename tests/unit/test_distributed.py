import pytest

from adakron.distributed import World, on_rank_0, read_world
from adakron.errors import ConfigError


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 1, 2)),  # torchrun
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, World(1, 2, 1, 2)),  # deepspeed
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            World(5, 8, 1, 4),
        ),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, World()),
    ],
)
def test_launchers_are_understood(environ, world):
    assert read_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "contradict"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "integers"),
    ],
)
def test_incomplete_or_contradicting_variables_are_refused(environ, said):
    with pytest.raises(ConfigError, match=said):
        read_world(environ)


def test_rank_0_speaks_for_all():
    assert on_rank_0(lambda: 5) == 5

    def fail() -> None:
        raise ConfigError("taken")

    with pytest.raises(ConfigError, match="taken"):
        on_rank_0(fail)
