"""A host: a process tree with a network, a name, mounts and process numbers of its own, as a machine has them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.parts import search_path
from tests.helpers.launch import BIN, ROOT, Finished

INIT = Path(__file__).parent / "templates" / "host.sh"


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll; AssertionError where it takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(0.05)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command on a host starts with: as a user's login shell on a cluster, without what launchers and schedulers set."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "SBATCH_", "PYTEST_", "GLOO_", "SSH_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
        "PATH": os.pathsep.join([str(BIN), search_path()]),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **(extra or {}),
    }


@dataclass
class Host:
    """One host. init: its first process; with it everything on the host ends. fence: the `unshare` that holds it."""

    name: str
    init: psutil.Process
    fence: "subprocess.Popen[bytes]"

    @classmethod
    def start(cls, name: str, folder: Path) -> "Host":
        """Make the namespaces. They end with this process, however it ends."""
        ready = folder / "log" / f"ready.{name}"
        ready.unlink(missing_ok=True)
        with (folder / "log" / f"host.{name}").open("ab") as log:
            fence = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child",
                 "--mount-proc", "bash", str(INIT), name, str(folder), str(ready)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment(),
            )  # fmt: skip
        try:
            wait_until(lambda: ready.exists() or fence.poll() is not None, 10, f"host {name} is up")
            assert fence.poll() is None, (folder / "log" / f"host.{name}").read_text()
            (init,) = psutil.Process(fence.pid).children()
        except BaseException:
            fence.kill()
            fence.wait()
            raise
        return cls(name, init, fence)

    def inside(self, command: Sequence[str], *, network_only: bool = False, cwd: Path = ROOT) -> list[str]:
        """The words that run a command on this host."""
        spaces = ["-n"] if network_only else ["-n", "-u", "-m", "-p", f"-w{cwd}"]
        return ["nsenter", "-t", str(self.init.pid), *spaces, "--", *command]

    def run(self, *command: str, timeout: float = 30, env: Mapping[str, str] | None = None, network_only: bool = False) -> Finished:
        """Run a command on this host to its end; AssertionError where it takes longer."""
        with subprocess.Popen(
            self.inside(command, network_only=network_only), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True, env=environment(env),
        ) as process:  # fmt: skip
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired as slow:
                raise AssertionError(f"{' '.join(command)} on {self.name} takes more than {timeout:g} s") from slow
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return Finished(process.returncode, stdout, stderr)

    def must(self, *command: str, timeout: float = 30, env: Mapping[str, str] | None = None, network_only: bool = False) -> str:
        """What a command that has to succeed prints."""
        finished = self.run(*command, timeout=timeout, env=env, network_only=network_only)
        assert finished.returncode == 0, f"{' '.join(command)} on {self.name}: {finished.output}"
        return finished.stdout

    def start_program(self, *command: str, log: Path, env: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """Begin a command on this host, as somebody at its terminal; both streams go to the log."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.inside(command), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, env=environment(env)
            )

    def processes(self, wanted: Callable[[list[str]], bool] = bool) -> list[psutil.Process]:
        """Live processes on this host whose command line is wanted; any that has one by default."""
        found = []
        with contextlib.suppress(OSError):  # a host that is switched off has none
            namespace = os.readlink(f"/proc/{self.init.pid}/ns/pid")
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):  # it may end while it is looked at
                    here = os.readlink(f"/proc/{process.pid}/ns/pid") == namespace
                    if here and process.status() != psutil.STATUS_ZOMBIE and wanted(process.cmdline()):
                        found.append(process)
        return found

    def ranks(self, output_dir: Path | None = None) -> list[psutil.Process]:
        """The processes here that train (into that folder), and not what launched them."""
        return self.processes(lambda words: _trains(words) and (output_dir is None or str(output_dir) in words))

    def kill(self) -> None:
        """End everything on this host, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.init.kill()
        self.fence.kill()
        self.fence.wait()


def _trains(words: list[str]) -> bool:
    # Launchers have the program among their words, too.
    return words[:1] != [] and "python" in Path(words[0]).name and [word for word in words[1:] if word != "-u"][:1] == ["launch/train.py"]
