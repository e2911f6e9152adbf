import os
import pwd
import socket

import psutil
import pytest

from adakron.errors import ConfigError
from adakron.launcher import World, described, interfaces, join, read_world
from adakron.launcher.threads import share_of_cores
from adakron.launcher.world import HAND
from tests.unit.launcher.test_world import ONE_HOST, STEP, TORCHRUN

LOOPBACK = interfaces.loopbacks()[0]


@pytest.fixture
def outward():
    """An interface of this machine that is no loopback, and its address."""
    for name in interfaces.usable_interfaces():
        for entry in psutil.net_if_addrs()[name]:
            if entry.family == socket.AF_INET:
                return name, entry.address
    pytest.skip("needs a network interface with an address beside the loopback")


def two_hosts(address: str) -> World:
    return World(0, 4, 0, 2, "Slurm", 2, address, 12345)


def test_a_single_process_is_left_alone():
    environ: dict[str, str] = {}
    join(World(), environ)
    assert environ == {}


def test_ranks_of_one_host_get_their_variables_and_no_interface():
    environ = dict(ONE_HOST)
    world = read_world(environ)
    join(world, environ)
    added = {name: value for name, value in environ.items() if name not in ONE_HOST}
    assert added == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(world.master_port),
    }  # fmt: skip
    again = read_world(environ)  # as a process that this one starts would
    assert (again.rank, again.world_size, again.master_addr, again.master_port) == (3, 4, "127.0.0.1", world.master_port)


def test_the_interface_of_several_hosts_is_the_one_that_carries_the_masters_address(outward, nccl_files):
    name, address = outward
    environ = dict(STEP)
    join(two_hosts(address), environ)
    assert environ["GLOO_SOCKET_IFNAME"] == name
    assert environ["NCCL_SOCKET_IFNAME"] == f"={name}"
    assert f"4 ranks on 2 hosts, started by Slurm; they meet at {address}:12345 over {name}; 1 thread per rank" == described(
        two_hosts(address), environ, 1
    )


def test_an_interface_that_was_named_stays(outward):
    environ = {"GLOO_SOCKET_IFNAME": outward[0], "NCCL_SOCKET_IFNAME": "ib0"}
    join(two_hosts(outward[1]), environ)
    assert (environ["GLOO_SOCKET_IFNAME"], environ["NCCL_SOCKET_IFNAME"]) == (outward[0], "ib0")


def test_a_host_that_calls_itself_by_a_loopback_still_finds_its_interface(outward, monkeypatch):
    """Debian's `127.0.1.1 n1` in /etc/hosts."""
    resolve = socket.getaddrinfo

    def as_debian(name, *arguments, **options):
        return resolve({"n1": "127.0.1.1", "n2": outward[1]}.get(name, name), *arguments, **options)

    monkeypatch.setattr(interfaces.socket, "getaddrinfo", as_debian)
    assert interfaces.towards("n1", 12345, ["n1", "n2"]) == outward[0]
    assert interfaces.towards("n1", 12345) not in interfaces.loopbacks()


def test_a_host_with_nothing_but_a_loopback_is_told_so(monkeypatch):
    monkeypatch.setattr(interfaces, "_source", lambda address, port: "127.0.0.1")
    monkeypatch.setattr(interfaces, "usable_interfaces", lambda: [])
    with pytest.raises(ConfigError, match=r"n1 is 127\.0\.0\.1 on .* itself.*no interface is up"):
        interfaces.towards("n1", 12345, ["n1", "n2"])


def test_which_of_two_interfaces_a_name_is_not_guessed_without_a_route(monkeypatch):
    monkeypatch.setattr(interfaces, "_source", lambda address, port: "127.0.0.1")
    monkeypatch.setattr(interfaces, "usable_interfaces", lambda: ["eth0", "ib0"])
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME \(eth0, ib0\)"):
        interfaces.towards("n1", 12345)


def test_an_unknown_master_is_an_error_and_not_a_wait():
    with pytest.raises(ConfigError, match=r"unknown to .*export MASTER_ADDR"):
        join(two_hosts("no-such-host.invalid"), {})


@pytest.mark.parametrize("world", [two_hosts("10.0.0.1"), World(0, 2, 0, 2, "deepspeed", 1, "127.0.0.1", 29500)])
def test_a_named_interface_that_is_not_there_is_refused(world):
    with pytest.raises(ConfigError, match=f"'ib7', and the interfaces of {socket.gethostname()} with an address are .*{LOOPBACK}"):
        join(world, {"GLOO_SOCKET_IFNAME": "ib7"})


def test_a_loopback_is_refused_across_hosts():
    with pytest.raises(ConfigError, match="over which no other host can be reached"):
        join(two_hosts("10.0.0.1"), {"GLOO_SOCKET_IFNAME": LOOPBACK})
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is localhost, which on each of the 2 hosts"):
        join(two_hosts("localhost"), {})


def test_several_hosts_on_one_machine_may_meet_on_its_loopback():
    agents = TORCHRUN | {"MASTER_ADDR": "127.0.0.1"}  # they have met there already
    join(read_world(agents), agents)
    assert "GLOO_SOCKET_IFNAME" not in agents
    sharing = agents | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    join(read_world(sharing), sharing)
    asked = {"GLOO_SOCKET_IFNAME": LOOPBACK}
    join(two_hosts("127.0.0.1"), asked)
    assert asked["MASTER_ADDR"] == "127.0.0.1"


def test_an_agents_name_for_itself_is_no_place_where_agents_have_met():
    apart = TORCHRUN | {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    with pytest.raises(ConfigError, match=r"localhost, which on each of the 2 hosts means the host itself; give torchrun --local-addr"):
        join(read_world(apart), apart)
    named = apart | {"GLOO_SOCKET_IFNAME": LOOPBACK}
    join(read_world(named), named)


@pytest.fixture
def nccl_files(tmp_path, monkeypatch):
    """Where NCCL would look: the site's file, the home folder's, another one."""
    monkeypatch.setattr(interfaces, "_SITE_FILE", tmp_path / "nccl.conf")
    entry = list(pwd.getpwuid(os.getuid()))
    entry[5] = str(tmp_path)
    monkeypatch.setattr(interfaces.pwd, "getpwuid", lambda user: pwd.struct_passwd(entry))
    return {"site": tmp_path / "nccl.conf", "home": tmp_path / ".nccl.conf", "named": tmp_path / "named.conf"}


@pytest.mark.parametrize(
    ("where", "named", "content", "chosen"),
    [
        ("site", False, "NCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME==ib0\n", False),
        ("home", False, "NCCL_SOCKET_IFNAME=ib0,ib1", False),
        ("named", True, "NCCL_SOCKET_IFNAME=^docker\n", False),
        ("site", True, "NCCL_SOCKET_IFNAME=ib0\n", False),
        ("home", True, "NCCL_SOCKET_IFNAME=ib0\n", True),  # NCCL reads the other one in its place
        ("site", False, "#NCCL_SOCKET_IFNAME=ib0\nNCCL_SOCKET_IFNAME\nNCCL_SOCKET_FAMILY=AF_INET\n", True),
        ("site", False, "\xff", True),
    ],
)
def test_the_interfaces_that_a_file_of_nccl_names_stay(outward, nccl_files, where, named, content, chosen):
    nccl_files[where].write_text(content, encoding="latin-1")
    environ = STEP | ({"NCCL_CONF_FILE": str(nccl_files["named"])} if named else {})
    join(two_hosts(outward[1]), environ)
    assert environ["GLOO_SOCKET_IFNAME"] == outward[0]
    assert ("NCCL_SOCKET_IFNAME" in environ) == chosen


STEP_OF_8 = STEP | {"SLURM_CPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    ("environ", "allowed", "threads"),
    [
        ({}, 64, 32),  # two ranks of a host share it
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "8"}, 64, 4),  # torchrun in a job on a node without binding
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2"}, 8, 4),  # of tasks that it did not start
        (STEP_OF_8 | {"SLURM_CPUS_PER_TASK": "3"}, 64, 3),
        (STEP_OF_8 | {"SLURM_CPUS_PER_TASK": "3"}, 1, 1),  # srun of 22.05 and later does not take sbatch's
        (STEP_OF_8, 64, 4),
        (STEP_OF_8, 8, 4),
        (STEP_OF_8, 5, 5),  # bound to cores of its own
        (STEP_OF_8, 1, 1),
    ],
)
def test_a_rank_computes_on_its_share_of_the_cores(environ, allowed, threads):
    launcher = "Slurm" if "SLURM_STEP_ID" in environ else "torchrun"
    world = World(0, 4, 0, 2, launcher, 2, "n1", 12345)
    assert share_of_cores(world, environ, allowed) == threads


@pytest.mark.parametrize(("size", "threads"), [("4", 3), ("2", 4)])
def test_a_task_that_gave_itself_its_rank_has_the_cores_of_a_task(size, threads):
    environ = STEP_OF_8 | {"SLURM_CPUS_PER_TASK": "3", "RANK": "1", "WORLD_SIZE": size, "LOCAL_RANK": "1"}
    world = World(1, int(size), 1, 2, HAND, 2, "n1", 12345)
    assert share_of_cores(world, environ, 64) == threads
