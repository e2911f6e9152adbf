"""A cluster of a login host and several compute hosts on this machine, with ssh and Slurm between them.

Nothing is added to this machine's own network: the hosts hang on a bridge inside a network namespace of its own. Nothing of its
/etc, /run or home folders is changed: the hosts have their own files mounted over them.
"""

import itertools
import os
import shutil
import string
import subprocess
from pathlib import Path
from types import TracebackType

from tests.cluster.hosts import Host, wait_until
from tests.cluster.parts import SLURM, SSH, Part, search_path

NETWORK = "10.77.0"
LOGIN = "login"
TEMPLATES = Path(__file__).parent / "templates"


class Cluster:
    """Use it as a context manager. folder: where everything of the cluster lies; compute hosts are n1, n2, ...

    parts: SSH and SLURM, or what of them is installed.
    """

    def __init__(self, folder: Path, compute: int, parts: tuple[Part, ...] = (SSH, SLURM)):
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, compute + 1)]
        self.parts = parts
        self._hosts: dict[str, Host] = {}
        self._addresses = {LOGIN: f"{NETWORK}.10", **{name: f"{NETWORK}.{10 + int(name[1:])}" for name in self.names}}
        self._links = itertools.count()
        self._link: dict[str, str] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_files()
            switch = self._hosts["switch"] = Host.start("switch", self.folder)
            switch.must("ip", "link", "add", "bridge", "type", "bridge", network_only=True)
            switch.must("ip", "link", "set", "bridge", "up", network_only=True)
            for name in self._addresses:
                self.boot(name)
            if SLURM in self.parts:
                self.wait_for_idle()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    @property
    def login(self) -> Host:
        return self._hosts[LOGIN]

    @property
    def compute(self) -> list[Host]:
        return [self._hosts[name] for name in self.names]

    def _end(self) -> None:
        for host in self._hosts.values():
            host.kill()
        self._hosts.clear()

    def boot(self, name: str) -> None:
        """Switch a host on: its link, its daemons."""
        if name in self._hosts:
            self._hosts[name].kill()
        host = self._hosts[name] = Host.start(name, self.folder)
        # A new name each time: sockets of the host's last life may hold the old link for a while.
        link = self._link[name] = f"{name}-{next(self._links)}"
        switch = self._hosts["switch"]
        switch.must("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(host.init.pid), network_only=True)
        switch.must("ip", "link", "set", link, "master", "bridge", "up", network_only=True)
        host.must("ip", "address", "add", f"{self._addresses[name]}/24", "dev", "eth0")
        host.must("ip", "link", "set", "eth0", "up")
        self._start_daemons(host)

    def _start_daemons(self, host: Host) -> None:
        log = self.folder / "log"
        if SSH in self.parts:
            sshd = shutil.which("sshd", path=search_path()) or "sshd"  # sshd insists on its full path
            host.must(sshd, "-E", str(log / f"sshd.{host.name}"))
        if SLURM in self.parts:
            host.must(
                "munged", "--force", f"--key-file={self.folder}/munge.key", "--socket=/run/munge/munge.socket.2",
                "--pid-file=/run/munge/munged.pid", "--seed-file=/run/munge/seed", f"--log-file={log}/munged.{host.name}",
            )  # fmt: skip
            host.must(*(["slurmctld", "-i"] if host.name == LOGIN else ["slurmd"]))

    def power_off(self, name: str) -> None:
        """Silence: the host's link goes down before its processes end, so that no connection is closed."""
        self.cut(name)
        self._hosts[name].kill()

    def cut(self, name: str) -> None:
        """Take the host's cable out."""
        self._hosts["switch"].must("ip", "link", "set", self._link[name], "down", network_only=True)

    def wait_for_idle(self) -> None:
        """Wait until Slurm has every compute host ready and empty."""

        def idle() -> bool:
            return self.login.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", timeout=10).stdout.strip() == str(len(self.names))

        wait_until(idle, 60, "all compute hosts are idle")

    def _write_files(self) -> None:
        for name in ("log", "state", "ssh", "etc/ssh", "etc/slurm"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self._addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        values = {"folder": str(self.folder), "login_address": self._addresses[LOGIN], "hosts": f"n[1-{len(self.names)}]"}
        for source, target in (
            ("slurm.conf", "slurm"), ("cgroup.conf", "slurm"), ("sshd_config", "ssh"), ("ssh_config", "ssh"),
        ):  # fmt: skip
            text = string.Template((TEMPLATES / source).read_text()).substitute(values)
            (self.folder / "etc" / target / source).write_text(text)
        if SSH in self.parts:
            self._make_keys()
        if SLURM in self.parts:
            key = self.folder / "munge.key"
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)

    def _make_keys(self) -> None:
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "ssh" / name)], check=True)
        kind, key, *_ = (self.folder / "ssh" / "host_key.pub").read_text().split()
        (self.folder / "ssh" / "known_hosts").write_text(f"* {kind} {key}\n")  # all hosts share it
