"""Which process this is of how many, and where they meet, from the variables of whatever started it."""

from collections.abc import Mapping
from dataclasses import dataclass

from adakron.errors import ConfigError
from adakron.launcher import slurm

DEFAULT_PORT = 29500
"""Where ranks of one host meet that nobody gave a port: torchrun's and DeepSpeed's."""

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

HAND, TORCHRUN, DEEPSPEED, SLURM, OPEN_MPI, HYDRA = "environment variables", "torchrun", "deepspeed", "Slurm", "Open MPI", "Hydra"


@dataclass(frozen=True)
class World:
    """The place of this process: its rank of world_size, its local_rank of local_world_size on this host.

    launcher: what started it. hosts: how many take part; None where the launcher does not say. master_addr, master_port: where
    the ranks meet; None in a single process. idle_tasks: tasks of a Slurm job that a process started beside srun leaves idle.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "python"
    hosts: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    idle_tasks: int = 0


@dataclass(frozen=True)
class _Found:
    """What one launcher's variables say. agents: how many processes of its own it has, one per host, where it says so."""

    launcher: str
    values: Mapping[str, str]
    hosts: int | None = None
    agents: int | None = None


def read_world(environ: Mapping[str, str]) -> World:
    """The place of this process; one process where no launcher speaks. The most particular launcher counts: ranks that torchrun,
    DeepSpeed or mpirun started are in a Slurm step, too, which is then that of their agents.

    Raises ConfigError where the variables are incomplete, contradict each other, or say no place to meet.
    """
    found = _from_variables(environ) or _from_open_mpi(environ) or _from_hydra(environ) or _from_slurm(environ)
    if found is None:
        return World(idle_tasks=0 if slurm.in_step(environ) else slurm.job_tasks(environ) - 1)
    size, rank, local_rank, local_size = _numbers(found)
    _check_outer(found, size, rank, environ)
    master = _master(found, size, local_size, environ) if size > 1 else (None, None)
    return World(rank, size, local_rank, local_size, found.launcher, found.hosts, *master)


def _from_variables(environ: Mapping[str, str]) -> _Found | None:
    given = [name for name in NAMES if name in environ]
    if not given:
        return None
    if len(given) < len(NAMES):
        raise ConfigError(
            f"{', '.join(given)} set, but not {', '.join(n for n in NAMES if n not in given)}: a launcher sets all of {', '.join(NAMES)}; "
            "start with deepspeed or torchrun, or unset them for one process"
        )
    local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    values = {name: environ[name] for name in NAMES} | {"LOCAL_WORLD_SIZE": local or "1"}
    # torchrun counts its agents as a group, DeepSpeed's launcher as a cross communicator; both have one per host.
    for launcher, name in ((TORCHRUN, "GROUP_WORLD_SIZE"), (DEEPSPEED, "CROSS_SIZE")):
        if name in environ:
            agents = slurm.number(environ, name, 1)
            return _Found(launcher, values, hosts=agents, agents=agents)
    if environ["WORLD_SIZE"] == str(slurm.step_tasks(environ)) != "1":  # a wrapper's, or ours: the step says more
        values["LOCAL_WORLD_SIZE"] = str(slurm.tasks_here(environ))
        return _Found(HAND, values, hosts=slurm.step_hosts(environ))
    return _Found(HAND, values, hosts=_hosts_of(values) if local else None)


def _from_open_mpi(environ: Mapping[str, str]) -> _Found | None:
    names = {
        "RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
    }  # fmt: skip
    if not all(name in environ for name in names.values()):
        return None
    values = {ours: environ[theirs] for ours, theirs in names.items()}
    return _Found(OPEN_MPI, values, hosts=_hosts_of(values))


def _from_hydra(environ: Mapping[str, str]) -> _Found | None:
    # srun's own PMI sets PMI_RANK and PMI_SIZE as well, but not these: then the step says more.
    names = {"RANK": "PMI_RANK", "WORLD_SIZE": "PMI_SIZE", "LOCAL_RANK": "MPI_LOCALRANKID", "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS"}
    if not all(name in environ for name in names.values()):
        return None
    values = {ours: environ[theirs] for ours, theirs in names.items()}
    return _Found(HYDRA, values, hosts=_hosts_of(values))


def _from_slurm(environ: Mapping[str, str]) -> _Found | None:
    tasks = slurm.step_tasks(environ)
    if tasks == 1:
        return None
    values = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(slurm.tasks_here(environ)),
    }
    return _Found(SLURM, values, hosts=slurm.step_hosts(environ))


def _hosts_of(values: Mapping[str, str]) -> int | None:
    """Hosts where each has as many ranks as this one; None where the numbers are none, which `_numbers` says."""
    size, local = values["WORLD_SIZE"], values["LOCAL_WORLD_SIZE"]
    return -(-int(size) // int(local)) if size.isdecimal() and local.isdecimal() and int(local) else None


def _numbers(found: _Found) -> tuple[int, int, int, int]:
    values = found.values
    try:
        size, rank, local_rank, local_size = (int(values[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except ValueError as error:
        raise ConfigError(
            f"the launcher's variables must be integers, got {dict(values)}; start with deepspeed, torchrun or srun"
        ) from error
    if not (0 <= rank < size and local_rank >= 0):
        raise ConfigError(f"the launcher's variables contradict each other: {dict(values)}; RANK must be in [0, WORLD_SIZE)")
    return size, rank, local_rank, max(local_size, local_rank + 1)


def _check_outer(found: _Found, size: int, rank: int, environ: Mapping[str, str]) -> None:
    """Raise ConfigError where this process is also one of several that srun or mpirun started, and does not count them in."""
    outer = {"srun": slurm.step_tasks(environ), "mpirun": slurm.number(environ, "OMPI_COMM_WORLD_SIZE", 1)}
    if found.launcher == SLURM:
        outer["srun"] = 1
    if found.launcher == OPEN_MPI:
        outer["mpirun"] = 1
    for launcher, tasks in outer.items():
        if tasks == 1:
            continue
        if found.agents == 1 or (found.agents is None and found.launcher != HAND and size == 1):
            raise ConfigError(
                f"{launcher} started {tasks} tasks, and in each of them {found.launcher} made a world of its own ({size} ranks):"
                f" {tasks} runs of one command; leave {found.launcher} out, or give it all nodes, with one task on each (torchrun --nnodes)"
            )
        if found.launcher == HAND and size != tasks:
            raise ConfigError(
                f"WORLD_SIZE is {size}, but {launcher} started {tasks} tasks (RANK is {rank}): the variables are another launcher's;"
                f" unset {', '.join(NAMES)}, and those of {launcher} count"
            )


def _master(found: _Found, size: int, local_size: int, environ: Mapping[str, str]) -> tuple[str, int]:
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    derived_port: int | None = None
    if found.launcher == SLURM or (found.launcher == HAND and slurm.step_tasks(environ) == size):
        address, derived_port = address or _first_host(environ), slurm.job_port(environ)
    elif found.launcher in (OPEN_MPI, HYDRA) and local_size == size:
        address, derived_port = address or "127.0.0.1", slurm.job_port(environ) or DEFAULT_PORT
    if not address or not (port or derived_port):
        missing = [name for name, there in (("MASTER_ADDR", address), ("MASTER_PORT", port or derived_port)) if not there]
        hint = " (mpirun: -x MASTER_ADDR=... -x MASTER_PORT=..., or -genv NAME VALUE)" if found.launcher in (OPEN_MPI, HYDRA) else ""
        raise ConfigError(f"{' and '.join(missing)} not set, with {size} processes; export the first host's name and a free port{hint}")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"MASTER_PORT is {port!r}; it must be a port, 1 to 65535: export another, or unset it under Slurm")
    return address, int(port) if port else int(derived_port or DEFAULT_PORT)


def _first_host(environ: Mapping[str, str]) -> str:
    names = slurm.hosts(environ)
    if slurm.step_hosts(environ) == 1:
        return "127.0.0.1"
    if not names:
        raise ConfigError("the step has no SLURM_STEP_NODELIST; export MASTER_ADDR, the name of rank 0's host")
    if environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary"):
        raise ConfigError(
            "the tasks are distributed arbitrarily (SLURM_HOSTFILE), so nothing says which host rank 0 is on; export MASTER_ADDR, its name"
        )
    return names[0]
