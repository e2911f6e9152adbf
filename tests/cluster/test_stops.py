"""Everything that Slurm and its users send to a run of two hosts, in one run that is stopped again and again."""

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import PATIENCE, Measured, Reference, Submit, thorough
from tests.cluster.hosts import wait_until
from tests.cluster.inputs import flags, newest_step, went_on_at
from tests.cluster.jobs import Job
from tests.cluster.virtual import Cluster
from tests.helpers.launch import python

pytestmark = thorough

LONG = ("--max_steps", "600")


@pytest.fixture(scope="module")
def long_reference(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "run"
    finished = python("launch/train.py", *flags(reference.inputs, ranks=1), *LONG, "--output_dir", str(folder), timeout=PATIENCE)
    assert finished.returncode == 0, finished.output
    return folder


def queued_again(job: Job, starts: int) -> None:
    """The job's own script, or Slurm, puts it back."""
    wait_until(lambda: job.detail("Restarts") == str(starts), PATIENCE, f"start {starts} of the job\n{job.output()[-3000:]}")
    wait_until(lambda: job.state == "RUNNING", PATIENCE, "the job runs again")


def test_signals_of_every_kind(with_slurm: Cluster, submit: Submit, long_reference: Path, measured: Measured):
    job = submit("stopped", 2, *LONG)
    run = job.run
    first, second = with_slurm["n1"], with_slurm["n2"]
    starts = 0
    for number, hosts, skew in (
        (signal.SIGUSR1, (first, second), 0.2), (signal.SIGTERM, (second, first), 1.0), (signal.SIGTERM, (second,), 0.0),
    ):  # fmt: skip
        job.wait_for_steps(10, PATIENCE)
        for rank in [host.ranks(run)[0] for host in hosts]:
            with contextlib.suppress(psutil.NoSuchProcess):  # the second one may have left with the first
                rank.send_signal(number)
            time.sleep(skew)
        starts += 1
        queued_again(job, starts)
        assert job.output().count(f"stopped by {number.name} at step") >= 1
    job.wait_for_steps(10, PATIENCE)
    # Of the partition that goes first; Slurm ends the job for it, with SIGTERM twice, and queues it again.
    with_slurm.login.must("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "srun sleep 1")
    queued_again(job, starts + 1)
    job.wait_for_steps(10, PATIENCE)
    with_slurm.login.must("scancel", job.number)
    assert job.end(PATIENCE) == "CANCELLED"
    wait_until(lambda: not any(host.ranks(run) for host in with_slurm.compute), 30, "the ranks left")
    stopped_at = newest_step(run)
    again = submit("stopped", 2, *LONG)
    assert again.end(PATIENCE) == "COMPLETED", again.output()
    steps = went_on_at(run)
    assert steps == sorted(set(steps)), steps
    assert len(steps) == 5
    assert steps[-1] == stopped_at
    measured.same_end("signals 0.2 s and 1 s apart, to one rank, preemption, scancel", run, long_reference)
