"""Slurm jobs: submitted, watched, signalled."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job_script import job_script
from launch.slurm import parser
from tests.cluster.hosts import Host

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Job:
    """A submitted job. log: both streams of all its starts."""

    name: str
    number: str
    login: Host
    log: Path

    @property
    def state(self) -> str:
        """Slurm's word for it, such as RUNNING."""
        return self._asked("%T")

    @property
    def hosts(self) -> str:
        """Slurm's list of the hosts it runs on, such as n[1-2]."""
        return self._asked("%N")

    def _asked(self, field: str) -> str:
        return self.login.must("squeue", "-h", "-j", self.number, "-t", "all", "-o", field).strip()

    def detail(self, name: str) -> str:
        """A value of `scontrol show job`, such as Restarts."""
        words = self.login.must("scontrol", "show", "job", self.number).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def signal(self, name: str, *options: str) -> None:
        """`scancel --signal`; option --batch: to the job's shell alone."""
        self.login.must("scancel", *options, f"--signal={name}", self.number)

    def output(self) -> str:
        """What it said so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def end(self, seconds: float) -> str:
        """Wait for its end; the state it ended in. `sbatch --wait` would look at it ever more seldom."""
        deadline = time.monotonic() + seconds
        while (state := self.state) not in ENDED:
            assert time.monotonic() < deadline, f"job {self.number} is {state} after {seconds:g} s\n{self.output()[-4000:]}"
            time.sleep(0.3)
        return state

    def cancel(self) -> None:
        """Before the next test: SIGKILL, and the hosts are free."""
        self.login.run("scancel", "--signal=KILL", "--full", self.number)
        self.login.run("scancel", self.number)


def submit(login: Host, name: str, request: Sequence[str], training: Sequence[str], run: Path, options: Sequence[str] = ()) -> Job:
    """Write a job script as launch/slurm.py does, and give it to sbatch.

    request: flags of launch/slurm.py. training: flags of launch/train.py. run: its output_dir; script and log lie beside it.
    """
    script, log = run.with_suffix(".sbatch"), run.with_suffix(".log")
    script.write_text(job_script(parser().parse(["--job_name", name, *request]), training, str(run), "a test"))
    return sbatch(login, name, script, log, options)


def sbatch(login: Host, name: str, script: Path, log: Path, options: Sequence[str] = ()) -> Job:
    """`sbatch OPTIONS SCRIPT`."""
    number = login.must("sbatch", "--parsable", f"--output={log}", *options, str(script), env={"SLURM_TMPDIR": str(log.parent)})
    return Job(name, number.strip(), login, log)
