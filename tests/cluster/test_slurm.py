"""Slurm jobs as launch/slurm.py writes them, over one to three hosts: they run, are warned, run out of time, lose a host, come back
on fewer. The end is that of an undisturbed run.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm
from tests.cluster.conftest import PATIENCE, Measured, Reference
from tests.cluster.hosts import wait_until
from tests.cluster.inputs import flags, logged, newest_step, went_on_at
from tests.cluster.slurm import Job
from tests.cluster.virtual import Cluster

Submit = Callable[..., Job]
SECONDS_OF_WARNING = 60


@pytest.fixture
def submit(with_slurm: Cluster, reference: Reference, tmp_path: Path) -> Iterator[Submit]:
    """Submits a run into tmp_path/NAME; what is left of the jobs is ended behind the test."""
    jobs: list[Job] = []

    def start(name: str, nodes: int, *training: str, per_node: int = 1, options: tuple[str, ...] = ()) -> Job:
        request = ["--nodes", str(nodes), "--tasks_per_node", str(per_node), "--signal_seconds", str(SECONDS_OF_WARNING)]
        given = [*flags(reference.inputs, ranks=nodes * per_node), *training]
        jobs.append(slurm.submit(with_slurm.login, name, request, given, tmp_path / name, options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.cancel()
    for host in with_slurm.compute:
        for rank in host.ranks():
            rank.kill()


def wait_for_steps(run: Path, job: Job, more: int) -> None:
    before = logged(run)
    wait_until(lambda: logged(run) >= before + more or job.state in slurm.ENDED, PATIENCE, f"{job.name} made {more} steps")
    assert job.state == "RUNNING", job.output()


def send(cluster: Cluster, run: Path, number: signal.Signals) -> None:
    """A signal to all ranks of a run. SIGSTOP lets it wait for Slurm's clock without using this machine's."""
    for host in cluster.compute:
        for rank in host.ranks(run):
            rank.send_signal(number)


def test_two_hosts_with_two_ranks_each(with_slurm: Cluster, reference: Reference, measured: Measured, tmp_path: Path):
    run, script, log = (tmp_path / name for name in ("run", "job.sbatch", "job.log"))
    said = with_slurm.login.must(
        "python", "launch/slurm.py", "--nodes", "2", "--tasks_per_node", "2", "--script", str(script), "--",
        *flags(reference.inputs, ranks=4), "--output_dir", str(run), timeout=PATIENCE,
    )  # fmt: skip
    assert "to start at" in said  # sbatch --test-only
    job = slurm.sbatch(with_slurm.login, "two-by-two", script, log)
    assert job.end(PATIENCE) == "COMPLETED", job.output()
    measured.same_end("sbatch, 2 hosts x 2 ranks", run, reference.folder)


def test_time_that_runs_out_with_and_without_a_warning(with_slurm: Cluster, submit: Submit, reference, measured: Measured, tmp_path):
    """Slurm looks at the time of jobs twice a minute, so both jobs wait for it together."""
    warned, stopped = submit("warned", 2), submit("stopped", 1, options=("--signal=B:28@1",))  # SIGWINCH says nothing
    for job in (warned, stopped):
        wait_for_steps(tmp_path / job.name, job, 20)
        send(with_slurm, tmp_path / job.name, signal.SIGSTOP)
    with_slurm.login.must("scontrol", "update", f"JobId={warned.number}", f"EndTime=now+{SECONDS_OF_WARNING + 25}")
    with_slurm.login.must("scontrol", "update", f"JobId={stopped.number}", "EndTime=now")
    # Slurm itself wakes the ranks of the one that it ends: SIGCONT and SIGTERM, both twice.
    assert stopped.end(60) == "TIMEOUT", stopped.output()
    assert "stopped by SIGTERM at step" in stopped.output()
    assert newest_step(tmp_path / "stopped") >= 20
    # The other one's step gets the warning from the job's shell, through srun.
    wait_until(lambda: _pending(with_slurm, tmp_path / "warned", signal.SIGUSR1), 35, "the warning came")
    with_slurm.login.must("scontrol", "update", f"JobId={warned.number}", "TimeLimit=30")
    send(with_slurm, tmp_path / "warned", signal.SIGCONT)
    assert warned.end(PATIENCE) == "COMPLETED", warned.output()
    assert warned.detail("Restarts") == "1"
    assert "stopped by SIGUSR1 at step" in warned.output()
    assert len(went_on_at(tmp_path / "warned")) == 1
    measured.same_end("USR1 before the time is over, queued again, 2 hosts", tmp_path / "warned", reference.folder)
    again = submit("stopped", 1)
    assert again.end(PATIENCE) == "COMPLETED", again.output()
    assert len(went_on_at(tmp_path / "stopped")) == 1
    measured.same_end("SIGTERM when the time is over, started again, 1 host", tmp_path / "stopped", reference.folder)


def _pending(cluster: Cluster, run: Path, number: signal.Signals) -> bool:
    """Whether a signal waits for every halted rank of a run."""
    masks = [
        int(line.split()[1], 16)
        for host in cluster.compute
        for rank in host.ranks(run)
        for line in Path(f"/proc/{rank.pid}/status").read_text().splitlines()
        if line.startswith("ShdPnd:")
    ]
    return bool(masks) and all(mask >> (number - 1) & 1 for mask in masks)


def test_a_host_that_is_switched_off_is_replaced(with_slurm: Cluster, submit: Submit, reference, measured: Measured, tmp_path: Path):
    job = submit("lost", 2, "--save_steps", "10")
    wait_for_steps(tmp_path / "lost", job, 20)
    assert job.hosts == "n[1-2]"
    with_slurm.power_off("n2")
    try:
        assert job.end(PATIENCE) == "COMPLETED", job.output()
    finally:
        with_slurm.boot("n2")
    assert job.hosts == "n[1,3]"
    assert went_on_at(tmp_path / "lost")[0] >= 10
    measured.same_end("a host switched off, queued again on a spare", tmp_path / "lost", reference.folder)
    with_slurm.wait_for_idle()


def test_three_hosts_go_on_as_two(submit: Submit, reference: Reference, measured: Measured, tmp_path: Path):
    job = submit("shrunk", 3, options=("--no-requeue",))
    wait_for_steps(tmp_path / "shrunk", job, 20)
    job.signal("USR1")  # to the ranks; the job's shell hears nothing
    assert job.end(PATIENCE) == "FAILED", job.output()
    assert job.detail("ExitCode") == "75:0"
    again = submit("shrunk", 2)
    assert again.end(PATIENCE) == "COMPLETED", again.output()
    assert len(went_on_at(tmp_path / "shrunk")) == 1
    measured.same_end("3 hosts, stopped, 2 hosts with the same global batch", tmp_path / "shrunk", reference.folder)
