"""Environments as Slurm 22.05, torchrun 2.13, DeepSpeed 0.19.8, Open MPI and MPICH set them, cut to what counts."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from adakron import ancestors
from adakron.errors import ConfigError
from adakron.launcher import World, read_world, slurm

JOB = {
    "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODELIST": "n[1-2]",
}  # fmt: skip
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = JOB | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_DISTRIBUTION": "block",
}  # fmt: skip
ONE_HOST = STEP | {"SLURM_STEP_NODELIST": "n2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
AGENTS = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
INTERACTIVE = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
INTERACTIVE_OLD = {name: value for name, value in INTERACTIVE.items() if name != "SLURM_STEP_NUM_TASKS"}
MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "29400"}
PLACE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
TORCHRUN = PLACE | MASTER | {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = PLACE | MASTER | {"LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PORT = slurm.job_port(STEP)


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, World()),
        (TORCHRUN, World(3, 4, 1, 2, "torchrun", 2, "n1", 29400)),
        (DEEPSPEED, World(3, 4, 1, 2, "deepspeed", 2, "n1", 29400)),
        (
            DEEPSPEED | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_SIZE": "1"},
            World(0, 1, 0, 1, "deepspeed", 1),
        ),
        (PLACE | MASTER, World(3, 4, 1, 2, "environment variables", None, "n1", 29400)),
        (PLACE | MASTER | {"LOCAL_WORLD_SIZE": "4"}, World(3, 4, 1, 4, "environment variables", 1, "n1", 29400)),
        (STEP, World(3, 4, 1, 2, "Slurm", 2, "n1", PORT)),
        (STEP | MASTER, World(3, 4, 1, 2, "Slurm", 2, "n1", 29400)),
        (STEP | {"MASTER_ADDR": "10.0.0.9"}, World(3, 4, 1, 2, "Slurm", 2, "10.0.0.9", PORT)),
        (ONE_HOST, World(3, 4, 1, 4, "Slurm", 1, "127.0.0.1", PORT)),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, World(3, 4, 1, 2, "Slurm", 2, "n1", PORT)),  # srun --mpi=pmi2
        (STEP | PLACE, World(3, 4, 1, 2, "environment variables", 2, "n1", PORT)),  # a wrapper: export RANK=$SLURM_PROCID ...
        (AGENTS | TORCHRUN, World(3, 4, 1, 2, "torchrun", 2, "n1", 29400)),  # srun --ntasks-per-node 1 torchrun --nnodes 2
        (BATCH | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, World(3, 4, 1, 2, "torchrun", 1, "n1", 29400)),  # in the batch script
        (OPEN_MPI | MASTER, World(3, 4, 1, 2, "Open MPI", 2, "n1", 29400)),
        (AGENTS | OPEN_MPI | MASTER, World(3, 4, 1, 2, "Open MPI", 2, "n1", 29400)),  # its daemons are a step
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, World(3, 4, 1, 4, "Open MPI", 1, "127.0.0.1", 29500)),
        (HYDRA | MASTER, World(3, 4, 1, 2, "Hydra", 2, "n1", 29400)),
        (BATCH, World(idle_tasks=3)),
        (JOB, World(idle_tasks=3)),  # salloc
        (INTERACTIVE, World(idle_tasks=3)),  # salloc, whose shell is a step on the first host
        (INTERACTIVE | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, World(3, 4, 1, 2, "torchrun", 1, "n1", 29400)),
        # Without SLURM_STEP_NUM_TASKS, what the job asked for would count.
        (INTERACTIVE_OLD | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, World(3, 4, 1, 2, "torchrun", 1, "n1", 29400)),
    ],
)
def test_launchers_are_understood(environ, world):
    assert read_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK"),
        (MASTER | {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "contradict"),
        (MASTER | {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "integers"),
        (MASTER | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "x"}, "integers"),
        (PLACE, "MASTER_ADDR and MASTER_PORT not set, with 4 processes"),
        (PLACE | {"MASTER_ADDR": "n1"}, "MASTER_PORT not set"),
        (PLACE | {"MASTER_ADDR": "n1", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (OPEN_MPI, "mpirun: -x MASTER_ADDR"),
        (HYDRA, "-genv"),
        # Every task of the step is a world for itself.
        (STEP | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "srun started 4 tasks, and in each of them torchrun"),
        (STEP | DEEPSPEED | {"CROSS_SIZE": "1"}, "srun started 4 tasks, and in each of them deepspeed"),
        (STEP | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, "in each of them Open MPI"),
        (OPEN_MPI | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "mpirun started 4 tasks, and in each of them torchrun"),
        # Left over in the shell that submitted the job.
        (STEP | MASTER | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "WORLD_SIZE is 1, but srun started 4 tasks"),
        (STEP | PLACE | MASTER | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun started 4 tasks"),
        (STEP | {"SLURM_DISTRIBUTION": "arbitrary"}, "which host rank 0 is on; export MASTER_ADDR"),
        (STEP | {"SLURM_STEP_NODELIST": "n[1-"}, "no list of hosts"),
        (STEP | {"SLURM_PROCID": "-"}, "integers"),
    ],
)
def test_incomplete_or_contradicting_variables_are_refused(environ, said):
    with pytest.raises(ConfigError, match=said):
        read_world(environ)


@contextlib.contextmanager
def first_task(*command: str, terminal: bool = True) -> Iterator[dict[str, str]]:
    """The variables below `srun --pty COMMAND`, or below a step without a terminal that was started there."""
    ours, theirs = os.openpty()
    words = ["setsid", *(["--ctty"] if terminal else []), *command]
    task = subprocess.Popen(words, stdin=theirs if terminal else subprocess.PIPE, stdout=theirs if terminal else subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while (found := ancestors.process(task.pid)) is None or found.words != command:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield STEP | {"SLURM_PTY_PORT": "36773", "SLURM_TASK_PID": str(task.pid)}
    finally:
        task.kill()
        task.communicate()
        os.close(ours)
        os.close(theirs)


def test_what_is_started_in_the_shell_of_a_step_is_beside_srun():
    with first_task("bash", "--norc") as environ:
        assert read_world(environ) == World(idle_tasks=3)
        alone = environ | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}
        assert read_world(alone) == World(3, 4, 1, 2, "torchrun", 1, "n1", 29400)


@pytest.mark.parametrize(
    ("command", "terminal"), [(("bash", "--norc"), False), (("bash", "-c", "sleep 60; :"), True), (("sleep", "60"), True)]
)
def test_tasks_of_a_step_that_has_a_terminal_or_was_started_in_one_are_ranks(command, terminal):
    with first_task(*command, terminal=terminal) as environ:
        assert read_world(environ) == World(3, 4, 1, 2, "Slurm", 2, "n1", PORT)


def test_a_task_that_is_gone_is_no_shell():
    environ = STEP | {"SLURM_PTY_PORT": "36773", "SLURM_TASK_PID": "999999999"}
    assert read_world(environ).world_size == 4
