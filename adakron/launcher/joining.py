"""What a rank of several makes ready before any of them waits for another: the interface, and the variables that libraries read."""

from collections.abc import Mapping, MutableMapping

from adakron.errors import ConfigError
from adakron.launcher import interfaces, slurm
from adakron.launcher.interfaces import GLOO, NCCL
from adakron.launcher.world import TORCHRUN, World

_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""True or False: whether the ranks meet in a store of torchrun's agents."""


def join(world: World, environ: MutableMapping[str, str]) -> None:
    """Check the way to the other ranks and export what torch and DeepSpeed read. Does nothing for a single process.

    Raises ConfigError where the other hosts cannot be reached, which would otherwise be a wait without end.
    """
    if world.world_size == 1 or world.master_addr is None or world.master_port is None:
        return
    spans = spans_hosts(world, environ)
    interfaces.check_named(environ, spans)
    if spans:
        # The process group always has a gloo part, on GPUs beside NCCL; NCCL's `=` is for this name and no longer one.
        name = environ.get(GLOO) or interfaces.towards(world.master_addr, world.master_port, slurm.hosts(environ))
        environ.setdefault(GLOO, name)
        if not interfaces.in_nccl_files(environ):  # which a variable would overrule
            environ.setdefault(NCCL, f"={name.split(',')[0]}")
    environ.update({
        "RANK": str(world.rank), "WORLD_SIZE": str(world.world_size), "LOCAL_RANK": str(world.local_rank),
        "MASTER_ADDR": world.master_addr, "MASTER_PORT": str(world.master_port),
    })  # fmt: skip
    if world.hosts is not None:  # else the number on this host is a guess
        environ["LOCAL_WORLD_SIZE"] = str(world.local_world_size)


def spans_hosts(world: World, environ: Mapping[str, str]) -> bool:
    """Whether the ranks are on several hosts. Raises ConfigError where they are, and meet on a loopback that each host has for itself."""
    alone = interfaces.is_loopback(world.master_addr or "")
    if world.hosts is None:
        return world.world_size > world.local_world_size and not alone
    if world.hosts == 1 or not alone:
        return world.hosts > 1
    # Whoever names a loopback for gloo runs all "hosts" on one machine, as tests do. So do torchrun's agents that share their store with
    # the ranks: they have met on it. Without that (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1) the address is what agent 0 calls itself.
    if environ.get(GLOO) in interfaces.loopbacks() or (world.launcher == TORCHRUN and environ.get(_AGENT_STORE) != "False"):
        return False
    remedy = "give torchrun --local-addr, its host's name" if world.launcher == TORCHRUN else "export the name of rank 0's host"
    raise ConfigError(
        f"MASTER_ADDR is {world.master_addr}, which on each of the {world.hosts} hosts means the host itself; {remedy}, or under Slurm"
        " unset it"
    )


def described(world: World, environ: Mapping[str, str], threads: int) -> str:
    """One line: what started the ranks, where they are and meet. After `join`."""
    allotted = slurm.number(environ, "SLURM_JOB_NUM_NODES", 1)
    on = "" if world.hosts is None else f" on {world.hosts} host{'s' if world.hosts > 1 else ''}"
    on += f" of the job's {allotted}" if world.hosts is not None and world.hosts < allotted else ""
    over = f" over {environ[GLOO]}" if environ.get(GLOO) else ""
    return (
        f"{world.world_size} ranks{on}, started by {world.launcher}; they meet at {world.master_addr}:{world.master_port}{over};"
        f" {threads} thread{'s' if threads > 1 else ''} per rank"
    )
