"""Slurm jobs: submitted, watched, signalled."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job_script import job_script
from launch.slurm import parser
from tests.cluster.hosts import Host, wait_until
from tests.cluster.inputs import logged

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Job:
    """A submitted job. run: the folder it trains into. log: both streams of all its starts."""

    number: str
    login: Host
    run: Path
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

    def wait_for_steps(self, more: int, seconds: float) -> None:
        """Wait until it has made so many more steps; AssertionError where it ends first."""
        before = logged(self.run)
        wait_until(lambda: logged(self.run) >= before + more or self.state in ENDED, seconds, f"{self.run.name} made {more} steps")
        assert self.state == "RUNNING", self.output()

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


def submit(login: Host, request: Sequence[str], training: Sequence[str], run: Path, options: Sequence[str] = ()) -> Job:
    """Write a job script as launch/slurm.py does, and give it to sbatch.

    request: flags of launch/slurm.py. training: flags of launch/train.py. run: its output_dir; script and log lie beside it.
    """
    script = run.with_suffix(".sbatch")
    script.write_text(job_script(parser().parse(["--job_name", run.name, *request]), training, str(run), "a test"))
    return sbatch(login, script, run, options)


def sbatch(login: Host, script: Path, run: Path, options: Sequence[str] = ()) -> Job:
    """`sbatch OPTIONS SCRIPT`."""
    log = run.with_suffix(".log")
    number = login.must("sbatch", "--parsable", f"--output={log}", *options, str(script), env={"SLURM_TMPDIR": str(run.parent)})
    return Job(number.strip(), login, run, log)
