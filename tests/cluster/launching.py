"""Launchers without a scheduler over several hosts: `deepspeed` with pdsh from the login host, `torchrun` on each host."""

import contextlib
import itertools
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.hosts import Host, wait_until
from tests.cluster.inputs import logged
from tests.cluster.virtual import LOGIN, Cluster

KEEP_ALIVE = "-oServerAliveInterval=3 -oServerAliveCountMax=3"
"""For PDSH_SSH_ARGS_APPEND: pdsh would wait for ever for a host that is silent."""

_VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_ports = itertools.count(29600)


@dataclass
class Launched:
    """Launchers that were started for one run. starters: one on the login host, or one on each host."""

    starters: list["subprocess.Popen[bytes]"]
    cluster: Cluster
    log: Path
    run: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        return [rank for host in self.cluster.compute for rank in host.ranks(self.run)]

    def processes(self) -> list[psutil.Process]:
        """Everything of the run on every host: launchers, ssh, ranks."""
        hosts = [self.cluster[LOGIN], *self.cluster.compute]
        return [one for host in hosts for one in host.processes(lambda words: any(str(self.run) in word for word in words))]

    def wait_for_steps(self, more: int, seconds: float) -> None:
        before = logged(self.run)
        ended = [starter.poll for starter in self.starters]
        wait_until(lambda: logged(self.run) >= before + more or any(poll() is not None for poll in ended), seconds, f"{more} steps")
        assert all(poll() is None for poll in ended), self.output()[-6000:]

    def codes(self, seconds: float) -> list[int]:
        """Wait for the ends of the launchers; their exit codes."""
        wait_until(lambda: all(starter.poll() is not None for starter in self.starters), seconds, "the launchers end")
        return [int(starter.returncode) for starter in self.starters]


@contextlib.contextmanager
def pdsh(cluster: Cluster, folder: Path, hosts: Sequence[str], flags: Sequence[str], run: Path) -> Iterator[Launched]:
    """`deepspeed --hostfile ... --launcher pdsh launch/train.py FLAGS`, one rank per host."""
    hostfile, variables = folder / "hostfile", folder / "deepspeed_env"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
    # DeepSpeed passes on little but PYTHONPATH by itself.
    variables.write_text("".join(f"{name}={value}\n" for name, value in _VARIABLES.items()))
    words = ["deepspeed", "--hostfile", str(hostfile), "--launcher", "pdsh", "--master_port", str(next(_ports))]
    environment = {"DS_ENV_FILE": str(variables), "PDSH_SSH_ARGS_APPEND": KEEP_ALIVE}
    log = folder / "pdsh.log"
    starter = cluster.login.start_program(*words, "launch/train.py", *flags, *into(run), log=log, env=environment)
    with _ended(Launched([starter], cluster, log, run)) as launched:
        yield launched


@contextlib.contextmanager
def torchrun(cluster: Cluster, folder: Path, hosts: Sequence[str], flags: Sequence[str], run: Path) -> Iterator[Launched]:
    """`torchrun --nnodes N ... launch/train.py FLAGS` on every host, one rank each; the ranks meet on the first."""
    port, log = next(_ports), folder / "torchrun.log"
    words = ["torchrun", f"--nnodes={len(hosts)}", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0]}:{port}"]
    starters = [cluster[host].start_program(*words, "launch/train.py", *flags, *into(run), log=log, env=_VARIABLES) for host in hosts]
    with _ended(Launched(starters, cluster, log, run)) as launched:
        yield launched


@contextlib.contextmanager
def _ended(launched: Launched) -> Iterator[Launched]:
    try:
        yield launched
    finally:
        for process in launched.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for starter in launched.starters:
            starter.kill()
            starter.wait()


def into(run: Path) -> list[str]:
    """Flags of a run that goes on there, where it was begun already."""
    return ["--output_dir", str(run), "--resume_from_checkpoint", "auto"]


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, which nobody can handle; there must be one to kill."""
    assert processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended with the one before
            process.send_signal(signal.SIGKILL)


def named(host: Host, name: str) -> list[psutil.Process]:
    """Processes on a host whose command is called so: a program of its own, or a script of Python's."""
    return host.processes(lambda words: name in [Path(word).name for word in words[:2]])
