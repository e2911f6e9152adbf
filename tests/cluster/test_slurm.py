"""Slurm jobs as launch/slurm.py writes them, over one to three hosts: they run, are warned, run out of time, lose a host, come back
on fewer. The end is that of an undisturbed run.
"""

import signal
from pathlib import Path

from tests.cluster import jobs
from tests.cluster.conftest import PATIENCE, SECONDS_OF_WARNING, Measured, Reference, Submit
from tests.cluster.hosts import wait_until
from tests.cluster.inputs import GLOBAL_BATCH, flags, logged, newest_step, went_on_at
from tests.cluster.virtual import Cluster


def send(cluster: Cluster, run: Path, number: signal.Signals) -> None:
    """A signal to all ranks of a run. SIGSTOP lets it wait for Slurm's clock without using this machine's."""
    for host in cluster.compute:
        for rank in host.ranks(run):
            rank.send_signal(number)


def test_two_hosts_with_two_ranks_each(with_slurm: Cluster, reference: Reference, measured: Measured, tmp_path: Path):
    run, script = tmp_path / "run", tmp_path / "job.sbatch"
    said = with_slurm.login.must(
        "python", "launch/slurm.py", "--nodes", "2", "--tasks_per_node", "2", "--script", str(script), "--",
        *flags(reference.inputs, ranks=4), "--output_dir", str(run), timeout=PATIENCE,
    )  # fmt: skip
    assert "to start at" in said  # sbatch --test-only
    job = jobs.sbatch(with_slurm.login, script, run)
    assert job.end(PATIENCE) == "COMPLETED", job.output()
    measured.same_end("sbatch, 2 hosts x 2 ranks", run, reference.folder)


def test_time_that_runs_out_with_and_without_a_warning(with_slurm: Cluster, submit: Submit, reference, measured: Measured, tmp_path):
    """Slurm looks at the time of jobs twice a minute, so both jobs wait for it together."""
    warned, stopped = submit("warned", 2), submit("stopped", 1, options=("--signal=B:28@1",))  # SIGWINCH says nothing
    halted: list[str] = []

    def halt() -> bool:  # whichever comes so far first: the other one's wait is not its own
        for job in (warned, stopped):
            if job.number not in halted and logged(job.run) >= 20:
                send(with_slurm, job.run, signal.SIGSTOP)
                halted.append(job.number)
        return len(halted) == 2

    wait_until(halt, PATIENCE, "both jobs made 20 steps")
    assert warned.state == stopped.state == "RUNNING", warned.output() + stopped.output()
    with_slurm.login.must("scontrol", "update", f"JobId={warned.number}", f"EndTime=now+{SECONDS_OF_WARNING + 25}")
    with_slurm.login.must("scontrol", "update", f"JobId={stopped.number}", "EndTime=now")
    # Slurm itself wakes the ranks of the one that it ends: SIGCONT and SIGTERM, both twice.
    assert stopped.end(60) == "TIMEOUT", stopped.output()
    assert "stopped by SIGTERM at step" in stopped.output()
    assert newest_step(stopped.run) >= 20
    # The other one's step gets the warning from the job's shell, through srun.
    wait_until(lambda: _pending(with_slurm, warned.run, signal.SIGUSR1), 35, "the warning came")
    with_slurm.login.must("scontrol", "update", f"JobId={warned.number}", "TimeLimit=30")
    send(with_slurm, warned.run, signal.SIGCONT)
    assert warned.end(PATIENCE) == "COMPLETED", warned.output()
    assert warned.detail("Restarts") == "1"
    assert "stopped by SIGUSR1 at step" in warned.output()
    assert len(went_on_at(warned.run)) == 1
    measured.same_end("USR1 before the time is over, queued again, 2 hosts", warned.run, reference.folder)
    again = submit("stopped", 1)
    assert again.end(PATIENCE) == "COMPLETED", again.output()
    assert len(went_on_at(stopped.run)) == 1
    measured.same_end("SIGTERM when the time is over, started again, 1 host", stopped.run, reference.folder)


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
    job.wait_for_steps(20, PATIENCE)
    assert job.hosts == "n[1-2]"
    with_slurm.power_off("n2")
    try:
        assert job.end(PATIENCE) == "COMPLETED", job.output()
    finally:
        with_slurm.boot("n2")
    assert job.hosts == "n[1,3]"
    assert went_on_at(job.run)[0] >= 10
    measured.same_end("a host switched off, queued again on a spare", job.run, reference.folder)
    with_slurm.wait_for_idle()


def test_three_hosts_go_on_as_two(submit: Submit, reference: Reference, measured: Measured, tmp_path: Path):
    any_number = ("--per_device_train_batch_size", "4", "--global_batch_size", str(GLOBAL_BATCH))  # two ranks need two passes
    job = submit("shrunk", 3, *any_number, options=("--no-requeue",))
    job.wait_for_steps(20, PATIENCE)
    job.signal("USR2")  # where do they stand? They say it, and nobody ends
    logs = [job.run / "logs" / f"rank{rank}.log" for rank in range(3)]
    wait_until(lambda: all("most recent call first" in log.read_text() for log in logs), PATIENCE, "the ranks said where they stand")
    job.wait_for_steps(5, PATIENCE)
    job.signal("USR1")  # to the ranks; the job's shell hears nothing
    assert job.end(PATIENCE) == "FAILED", job.output()
    assert job.detail("ExitCode") == "75:0"
    again = submit("shrunk", 2, *any_number)
    assert again.end(PATIENCE) == "COMPLETED", again.output()
    assert len(went_on_at(job.run)) == 1
    measured.same_end("3 hosts, stopped, 2 hosts with the same global batch", job.run, reference.folder)
