import socket
import sys

import pytest
import torch

from adakron.distributed import on_rank_0, select_device
from adakron.errors import ConfigError
from adakron.launcher import World
from tests.helpers.launch import run

MEETS = """
import torch
from adakron import distributed
from launch.program import execute

execute(lambda arguments, world: distributed.form_group(world, torch.device("cpu")))
"""


def test_rank_0_speaks_for_all():
    assert on_rank_0(lambda: 5) == 5

    def fail() -> None:
        raise ConfigError("taken")

    with pytest.raises(ConfigError, match="taken"):
        on_rank_0(fail)


def test_a_port_that_is_taken_is_an_error_with_its_remedy():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        port = str(taken.getsockname()[1])
        finished = run([sys.executable, "-c", MEETS], env=place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, timeout=60)
    assert finished.returncode == 2, finished.output
    assert f"error: port {port} of 127.0.0.1, where the ranks are to meet, is taken" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("left_over", [{"MASTER_ADDR": "n1"}, {"MASTER_PORT": "29500"}])
def test_one_process_meets_nobody_where_half_a_place_is_left_over(left_over):
    finished = run([sys.executable, "-c", MEETS], env=left_over, timeout=60)
    assert finished.returncode == 0, finished.output


@pytest.mark.parametrize(("environ", "remedy"), [({}, False), ({"SLURM_JOB_ID": "7"}, True)])
def test_more_ranks_than_gpus_are_refused(monkeypatch, environ, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="4 processes on a host with 1 GPUs") as refused:
        select_device(World(1, 4, 1, 4), environ)
    assert ("--gpus-per-node" in str(refused.value)) is remedy
