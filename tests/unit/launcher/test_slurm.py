import shutil
import subprocess

import pytest

from adakron.errors import ConfigError
from adakron.launcher import slurm


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07]", ["n1", "n2", "n3", "n07"]),
        ("a1,b[2-3]c", ["a1", "b2c", "b3c"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("r[1-2]n[08-09].local", ["r1n08.local", "r1n09.local", "r2n08.local", "r2n09.local"]),
        ("z9,a[5,1-2]", ["z9", "a5", "a1", "a2"]),  # the order is that of the tasks, not of the alphabet
    ],
)
def test_a_compressed_list_is_its_hosts_in_order(text, hosts):
    assert slurm.expand_nodelist(text) == hosts
    if shutil.which("scontrol"):
        shown = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True)
        assert shown.returncode != 0 or shown.stdout.split() == hosts  # without a configuration it shows nothing


@pytest.mark.parametrize(
    "text", ["", "n[1-", "n]", "n[3-1]", "n[1-x]", "n[]", "n[1,,2]", ",", "a b", "n[[1]]", "n[0-999999999]", "(null)\n"]
)
def test_what_is_no_list_is_refused(text):
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        slurm.expand_nodelist(text)


def port(job: int, step: int = 0) -> int:
    found = slurm.job_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
    assert found is not None
    return found


def test_a_port_is_the_jobs_own_and_the_steps_and_no_ephemeral_one():
    ports = {port(job, step) for job in range(1000, 1040) for step in range(20)}
    assert len(ports) == 40 * 20
    assert min(ports) >= 12000 and max(ports) < 32768
    assert port(2**32 - 1, 7) in range(12000, 32768)
    assert slurm.job_port({}) is None


def test_a_port_stays_when_the_job_is_queued_again():
    assert port(17) == slurm.job_port({"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "3"})


@pytest.mark.parametrize(("node", "tasks"), [("0", 2), ("2", 2), ("3", 1)])
def test_tasks_of_a_host_are_those_of_its_place_in_the_list(node, tasks):
    assert slurm.tasks_here({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": node}) == tasks


def test_damaged_variables_are_refused():
    with pytest.raises(ConfigError, match="whole number"):
        slurm.step_tasks({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "two"})
    with pytest.raises(ConfigError, match=r"2\(x3\),1"):
        slurm.tasks_here({"SLURM_STEP_TASKS_PER_NODE": "2(x"})
