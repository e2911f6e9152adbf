"""How this process was started: the launcher's variables made into rank, world size, a place to meet, an interface, threads.

Slurm steps, torchrun, the DeepSpeed launchers, Open MPI and Hydra (MPICH, Intel MPI) each say it in their own way. What is ambiguous or
missing is a ConfigError before anything waits for anybody. docs/multinode.md is for users.
"""

from adakron.launcher.joining import described, join
from adakron.launcher.threads import use_threads
from adakron.launcher.world import World, read_world

__all__ = ["World", "described", "join", "read_world", "use_threads"]
