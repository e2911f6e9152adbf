"""Slurm jobs that run, are warned, run out of time, lose a host, come back on fewer: the end is that of an undisturbed run."""

import signal

import pytest

from tests.cluster.conftest import Measured, Reference
from tests.cluster.hosts import wait_until
from tests.cluster.inputs import flags, logged, newest_step, went_on_at
from tests.cluster.slurm import Job, submit
from tests.cluster.virtual import Cluster

PATIENCE = 300.0
"""Seconds that a job may take on a busy machine before it counts as hanging."""


@pytest.fixture
def sbatch(with_slurm: Cluster, reference: Reference, tmp_path):
    """`sbatch OPTIONS` of a training run into tmp_path/NAME; what is left of the jobs is ended behind the test."""
    jobs: list[Job] = []

    def start(name: str, *options: str, more: tuple[str, ...] = ()) -> Job:
        run = tmp_path / name
        arguments = [*flags(reference.inputs, run, ranks=None), *more]
        jobs.append(submit(with_slurm.login, name, options, arguments, run, tmp_path))
        return jobs[-1]

    yield start
    for job in jobs:
        job.cancel()
    for host in with_slurm.compute:
        for process in host.ranks():
            process.kill()


def wait_for_steps(run, job: Job, more: int) -> None:
    before = logged(run)
    wait_until(lambda: logged(run) >= before + more or job.state in ("FAILED", "CANCELLED"), PATIENCE, f"{more} more steps\n{job.output()}")
    assert job.state == "RUNNING", job.output()


def pause(cluster: Cluster, run) -> None:
    """Halt the ranks of a run: it waits for Slurm's clock without using this machine's."""
    for host in cluster.compute:
        for rank in host.ranks(run):
            rank.suspend()


def go_on(cluster: Cluster, run) -> None:
    for host in cluster.compute:
        for rank in host.ranks(run):
            rank.send_signal(signal.SIGCONT)


def test_two_hosts_with_two_ranks_each(sbatch, reference: Reference, measured: Measured, tmp_path):
    job = sbatch("two-by-two", "--nodes=2", "--ntasks-per-node=2")
    assert job.end(PATIENCE) == "COMPLETED", job.output()
    measured.same_end("sbatch, 2 hosts x 2 ranks", tmp_path / "two-by-two", reference.folder)


def test_time_that_runs_out_with_and_without_a_warning(with_slurm: Cluster, sbatch, reference: Reference, measured: Measured, tmp_path):
    """Slurm looks at the time of jobs twice a minute, so both jobs wait for it together."""
    warned = sbatch("warned", "--nodes=2", "--time=30", "--signal=B:USR1@60", "--requeue")
    stopped = sbatch("stopped", "--nodes=1", "--time=30")
    for job in (warned, stopped):
        wait_for_steps(tmp_path / job.name, job, 20)
        pause(with_slurm, tmp_path / job.name)
    with_slurm.login.must("scontrol", "update", f"JobId={warned.number}", "EndTime=now+85")
    with_slurm.login.must("scontrol", "update", f"JobId={stopped.number}", "EndTime=now")
    # Slurm itself wakes the ranks of the one that it ends: SIGCONT and SIGTERM, both twice.
    assert stopped.end(60) == "TIMEOUT", stopped.output()
    assert "stopped by SIGTERM at step" in stopped.output()
    assert newest_step(tmp_path / "stopped") >= 20
    wait_until(lambda: "warned by Slurm" in warned.output(), 35, "USR1 came")
    go_on(with_slurm, tmp_path / "warned")
    assert warned.end(PATIENCE) == "COMPLETED", warned.output()
    assert warned.detail("Restarts") == "1"
    assert "stopped by SIGUSR1 at step" in warned.output()
    assert len(went_on_at(tmp_path / "warned")) == 1
    measured.same_end("USR1 before the time is over, queued again, 2 hosts", tmp_path / "warned", reference.folder)
    again = sbatch("stopped", "--nodes=1")
    assert again.end(PATIENCE) == "COMPLETED", again.output()
    assert len(went_on_at(tmp_path / "stopped")) == 1
    measured.same_end("SIGTERM when the time is over, started again, 1 host", tmp_path / "stopped", reference.folder)


def test_a_host_that_is_switched_off_is_replaced(with_slurm: Cluster, sbatch, reference: Reference, measured: Measured, tmp_path):
    job = sbatch("lost", "--nodes=2", "--requeue", more=("--save_steps", "10"))
    wait_for_steps(tmp_path / "lost", job, 20)
    assert job.hosts == "n[1-2]"
    pause(with_slurm, tmp_path / "lost")
    with_slurm.power_off("n2")
    go_on(with_slurm, tmp_path / "lost")
    assert job.end(PATIENCE) == "COMPLETED", job.output()
    assert job.hosts == "n[1,3]"
    assert went_on_at(tmp_path / "lost")
    measured.same_end("host switched off, queued again on a spare", tmp_path / "lost", reference.folder)
    with_slurm.boot("n2")
    with_slurm.wait_for_idle()


def test_three_hosts_go_on_as_two(sbatch, reference: Reference, measured: Measured, tmp_path):
    job = sbatch("shrunk", "--nodes=3")
    wait_for_steps(tmp_path / "shrunk", job, 20)
    job.signal("USR1")
    assert job.end(PATIENCE) == "FAILED", job.output()
    assert job.detail("ExitCode") == "75:0"
    again = sbatch("shrunk", "--nodes=2")
    assert again.end(PATIENCE) == "COMPLETED", again.output()
    assert len(went_on_at(tmp_path / "shrunk")) == 1
    measured.same_end("3 hosts, stopped, 2 hosts with the same global batch", tmp_path / "shrunk", reference.folder)
