"""Which network interface the ranks of several hosts talk over.

gloo takes the address that the host's own name resolves to, on Debian `127.0.1.1`: then one rank fails and the others wait for it, for
longer than any timeout. So the interface is named: the one whose address routes to the place where the ranks meet.
"""

import contextlib
import ipaddress
import os
import pwd
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from adakron.errors import ConfigError
from adakron.untrusted import UnreadableError, read_text

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"

# An address of the documentation (RFC 5737), which nobody has: it is routed as the rest of the world is. Nothing is sent there.
_ELSEWHERE = "192.0.2.1"
_SITE_FILE = Path("/etc/nccl.conf")
_TRIED = 4  # a name that nobody knows may take seconds


def check_named(environ: Mapping[str, str], spans_hosts: bool) -> None:
    """Raise ConfigError where GLOO_SOCKET_IFNAME names what this host has not, or what no other host can reach."""
    given = environ.get(GLOO)
    if not given:
        return
    there = [*usable_interfaces(), *loopbacks()]
    for name in given.split(","):
        if name not in there:
            raise ConfigError(
                f"{GLOO} names {name!r}, and the interfaces of {socket.gethostname()} with an address are {', '.join(there)}; export one"
                " of them, or unset it to have it chosen"
            )
        if spans_hosts and name in loopbacks():
            raise ConfigError(
                f"{GLOO} is {given}, over which no other host can be reached, and several take part; unset it to have it chosen, or name"
                f" another (here: {', '.join(usable_interfaces())})"
            )


def in_nccl_files(environ: Mapping[str, str]) -> bool:
    """Whether a file that NCCL reads names its interfaces: the site's, and NCCL_CONF_FILE's or, without that, ~/.nccl.conf.

    NCCL takes lines NAME=VALUE from them where the environment has no such variable. What cannot be read says nothing.
    """
    files = [_SITE_FILE]
    if environ.get("NCCL_CONF_FILE"):
        files.append(Path(environ["NCCL_CONF_FILE"]))
    else:
        with contextlib.suppress(KeyError):  # a user without an entry, as in containers; NCCL does not look at HOME either
            files.append(Path(pwd.getpwuid(os.getuid()).pw_dir, ".nccl.conf"))
    for file in files:
        with contextlib.suppress(OSError, UnreadableError):
            if any(line.startswith(f"{NCCL}=") for line in read_text(file).splitlines()):
                return True
    return False


def towards(address: str, port: int, others: Sequence[str] = ()) -> str:
    """The interface of this host whose address routes to where the ranks meet; never a loopback.

    address: that place, a host's name or address. On that host itself it is the interface that carries it; where the name means
    127.0.1.1 there, the one that routes to the first of the other hosts, or to the world, or the only one there is.

    Raises ConfigError where the name means nothing, no route leads there, or no interface is left.
    """
    source = _source(address, port)
    found = interface_of(source)
    if found is None:
        raise ConfigError(f"no interface of {socket.gethostname()} carries {source}, which routes to {address}; export {GLOO} with one")
    if found not in loopbacks():
        return found
    for other in (*[name for name in others if name != address][:_TRIED], _ELSEWHERE):
        try:
            found = interface_of(_source(other, port))
        except ConfigError:
            continue
        if found is not None and found not in loopbacks():
            return found
    usable = usable_interfaces()
    if len(usable) == 1:
        return usable[0]
    raise ConfigError(
        f"{address} is {source} on {socket.gethostname()} itself, where no other host can reach it; export {GLOO}"
        f" ({', '.join(usable) or 'no interface is up'}), or mend the name in /etc/hosts"
    )


def is_loopback(address: str) -> bool:
    """Whether a place to meet is, as it is written, on this host alone: localhost, 127.0.0.1, ::1."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address.split(".")[0] == "localhost"


def interface_of(address: str) -> str | None:
    """The interface that carries an address."""
    wanted = address.split("%")[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == wanted for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)):
            return str(name)
    # All of 127.0.0.0/8 is the loopback's, though it carries one of it.
    return next(iter(loopbacks()), None) if is_loopback(wanted) else None


def loopbacks() -> list[str]:
    """The loopback interfaces of this host."""
    return [name for name, entries in psutil.net_if_addrs().items() if any(is_loopback(entry.address.split("%")[0]) for entry in entries)]


def usable_interfaces() -> list[str]:
    """Interfaces that are up and have an address that other hosts may reach."""
    up = [name for name, state in psutil.net_if_stats().items() if state.isup and name not in loopbacks()]
    families = (socket.AF_INET, socket.AF_INET6)
    return [name for name in up if any(entry.family in families for entry in psutil.net_if_addrs().get(name, ()))]


def _source(address: str, port: int) -> str:
    """The address of this host that packets to another one would come from. Connecting a UDP socket sends none."""
    try:
        targets = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise ConfigError(
            f"the host {address!r}, where the ranks are to meet, is unknown to {socket.gethostname()} ({error}); export MASTER_ADDR with a"
            " name or address that all hosts know"
        ) from error
    reason: OSError | None = None
    for family, kind, protocol, _, target in targets:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
        except OSError as error:
            reason = error
    raise ConfigError(
        f"{socket.gethostname()} has no route to {address} ({reason}), where the ranks are to meet; export MASTER_ADDR with an address"
        " that it can reach"
    )
