"""How many threads a rank computes with: its share of the cores that it may run on."""

import os
from collections.abc import Mapping

import torch

from adakron.launcher import slurm
from adakron.launcher.world import HAND, SLURM, World


def use_threads(world: World, environ: Mapping[str, str]) -> int:
    """Give this rank its share of the cores, unless OMP_NUM_THREADS decides; returns the number of threads."""
    if "OMP_NUM_THREADS" not in environ:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(share_of_cores(world, environ, allowed))
    return torch.get_num_threads()


def share_of_cores(world: World, environ: Mapping[str, str], allowed: int) -> int:
    """Cores for this rank. allowed: those of its affinity mask.

    A task of a Slurm step, whether it gave itself RANK and the like or not, has as many as --cpus-per-task says. Where it does not
    say: fewer allowed than the step has on this host means that the task is bound to cores of its own; else the step's are shared.
    All other ranks share what their launcher got.
    """
    of_job = min(allowed, slurm.number(environ, "SLURM_CPUS_ON_NODE", allowed)) if "SLURM_JOB_ID" in environ else allowed
    if world.launcher == SLURM or (world.launcher == HAND and world.world_size == slurm.step_tasks(environ) > 1):
        per_task = slurm.number(environ, "SLURM_CPUS_PER_TASK", 0)
        if per_task:
            return max(1, min(allowed, per_task))
        if allowed < slurm.number(environ, "SLURM_CPUS_ON_NODE", 0):
            return max(1, allowed)
    return max(1, of_job // world.local_world_size)
