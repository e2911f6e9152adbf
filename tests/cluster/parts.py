"""What a cluster on this machine needs, and which of it is here: `python -m tests.cluster.parts` installs what is missing.

Standard library only: it runs before anything is known of the machine.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """A part of the cluster: the commands it needs, and the Debian packages that hold them."""

    name: str
    commands: tuple[str, ...]
    packages: tuple[str, ...]


HOSTS = Part("hosts", ("ip", "unshare", "nsenter", "setpriv", "sysctl"), ("iproute2", "util-linux", "procps"))
SSH = Part("ssh", ("sshd", "ssh", "ssh-keygen", "pdsh"), ("openssh-server", "openssh-client", "pdsh"))
SLURM = Part(
    "Slurm", ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol"), ("munge", "slurm-wlm", "slurm-client")
)  # fmt: skip
PARTS = (HOSTS, SSH, SLURM)

# Everything that a host of the cluster is made of, tried out: containers often hold root without the right to do it.
_TRIAL = "ip link add trial0 type bridge && ip link add trial1 type veth peer name trial2 && mount -t tmpfs tmpfs /run"
_UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def search_path() -> str:
    """PATH with the folders of daemons, which a shell of root may lack."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def absent(part: Part) -> list[str]:
    """The commands of a part that are not installed."""
    return [command for command in part.commands if shutil.which(command, path=search_path()) is None]


def obstacle(*parts: Part) -> str | None:
    """Why these parts cannot run here, hosts always among them; None where they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "not root: namespaces with a network of their own need it"
    for part in dict.fromkeys((HOSTS, *parts)):
        if missing := absent(part):
            return f"no {', '.join(missing)} (Debian: apt-get install {' '.join(part.packages)}; make test-cluster does it)"
    trial = subprocess.run(
        [*_UNSHARE, "sh", "-c", _TRIAL], capture_output=True, text=True, env={**os.environ, "PATH": search_path()}, timeout=60
    )
    return f"this kernel or container makes no namespaces: {trial.stderr.strip()[:200]}" if trial.returncode else None


def install() -> str | None:
    """Install what is missing from Debian's packages, without starting any service; why it was not done, or None."""
    packages = sorted({package for part in PARTS if absent(part) for package in part.packages})
    if not packages:
        return None
    if os.geteuid() != 0:
        return f"not root, and {' '.join(packages)} are not installed"
    if shutil.which("apt-get") is None:
        return f"no apt-get, and {' '.join(packages)} are not installed"
    print(f"installing {' '.join(packages)}", flush=True)
    with _no_service_starts():
        for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            done = subprocess.run(
                ["apt-get", "-qq", *words], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            if done.returncode:
                return f"apt-get {words[0]} failed: {done.stdout.strip()[-300:]}"
    return None


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Debian asks this file whether a package may start its daemons on this machine; 101 is no."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def main() -> None:
    """Install, and say what the tests will find. Never an error: what cannot run is skipped there, with the same reason."""
    reason = install()
    if reason:
        print(f"SKIPPED: {reason}", flush=True)


if __name__ == "__main__":
    main()
