"""What Slurm's variables say of a step: its hosts, its tasks, and a port that no other step of the cluster's jobs is likely to have."""

import itertools
import re
from collections.abc import Mapping

from adakron import ancestors
from adakron.errors import ConfigError

PORTS = range(12000, 32768)
"""Where ports are derived: above the usual services, below Linux's default ephemeral ports (32768 to 60999)."""

_PORTS_PER_JOB = 9973  # a prime without a common factor with len(PORTS): neighbouring jobs lie far apart, the steps of one side by side
_MOST_HOSTS = 100_000
_INTERACTIVE_STEP = "4294967290"  # SLURM_INTERACTIVE_STEP of slurm.h: the shell of salloc with LaunchParameters=use_interactive_step
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_PARTS = re.compile(r"([^\[\],]*)(?:\[([^\]]*)\])?")


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script, and the shell of salloc, have the job's variables but no step's.

    What a user starts in the shell of `srun --pty`, or in salloc's where that is a step of its own, is started beside srun.
    """
    if "SLURM_PROCID" not in environ or environ.get("SLURM_STEP_ID", _INTERACTIVE_STEP) == _INTERACTIVE_STEP:
        return False
    return not _in_shell_of_step(environ)


def _in_shell_of_step(environ: Mapping[str, str]) -> bool:
    # A step that is started in that shell inherits SLURM_PTY_PORT; its tasks have no terminal.
    if "SLURM_PTY_PORT" not in environ:
        return False
    task = ancestors.process(number(environ, "SLURM_TASK_PID", 0))
    return task is not None and task.terminal != 0 and task.is_interactive_shell()


def step_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the step that this process is one of; 1 outside of a step."""
    if not in_step(environ):
        return 1
    return number(environ, "SLURM_STEP_NUM_TASKS", number(environ, "SLURM_NTASKS", 1))


def job_tasks(environ: Mapping[str, str]) -> int:
    """Tasks that the job asked for; 1 outside of a job."""
    return number(environ, "SLURM_NTASKS", 1) if "SLURM_JOB_ID" in environ else 1


def hosts(environ: Mapping[str, str]) -> list[str]:
    """Names of the step's hosts, the one of task 0 first; the job's outside of a step; none outside of a job."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next((expand_nodelist(environ[name]) for name in names if environ.get(name)), [])


def step_hosts(environ: Mapping[str, str]) -> int:
    """How many hosts the step has."""
    return number(environ, "SLURM_STEP_NUM_NODES", len(hosts(environ)))


def tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks of the step on this host."""
    counts = _tasks_per_host(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1")
    here = number(environ, "SLURM_NODEID", 0)
    return counts[here] if 0 <= here < len(counts) else counts[0]


def job_port(environ: Mapping[str, str]) -> int | None:
    """A port for the step, alike on all of its hosts; None outside of a job. The job's id stays when it is queued again."""
    if "SLURM_JOB_ID" not in environ:
        return None
    job, step = number(environ, "SLURM_JOB_ID", 0), number(environ, "SLURM_STEP_ID", 0)
    return PORTS[(job * _PORTS_PER_JOB + step) % len(PORTS)]


def number(environ: Mapping[str, str], name: str, otherwise: int) -> int:
    """A variable that holds a whole number, at least 0. Raises ConfigError where it holds anything else."""
    text = environ.get(name)
    if text is None:
        return otherwise
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ConfigError(f"{name} is {text!r}; launchers set a whole number there: start with one of them, or unset it")
    return int(text)


def expand_nodelist(text: str) -> list[str]:
    """Host names of a compressed list, in its order: `n[1-3,07],b` is n1, n2, n3, n07, b. Raises ConfigError where it is none.

    Several brackets in a name count like the digits of a number, the last one fastest; zeros in front of a range's begin stay.
    """
    found: list[str] = []
    for entry in _entries(text):
        choices = [_choices(literal, ranges, text) for literal, ranges in _PARTS.findall(entry) if literal or ranges]
        for parts in itertools.product(*choices):
            found.append("".join(parts))
            if len(found) > _MOST_HOSTS:
                raise _unreadable(text)
    if not found or not all(found):
        raise _unreadable(text)
    return found


def _entries(text: str) -> list[str]:
    """The list without its compression inside brackets: split at commas outside of them."""
    if not re.fullmatch(r"(?:[^\[\]\s]|\[[0-9,-]+\])+", text):
        raise _unreadable(text)
    return re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text)


def _choices(literal: str, ranges: str, text: str) -> list[str]:
    if not ranges:
        return [literal]
    found: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _unreadable(text)
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) <= _MOST_HOSTS:
            raise _unreadable(text)
        found += [f"{literal}{value:0{len(first)}d}" for value in range(int(first), int(last) + 1)]
    return found


def _tasks_per_host(text: str) -> list[int]:
    """Tasks by host of `2(x3),1`: 2, 2, 2, 1. Raises ConfigError where it is no such list."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise ConfigError(f"the tasks per node are {text!r}, which is no list like 2(x3),1; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts or [1]


def _unreadable(text: str) -> ConfigError:
    return ConfigError(
        f"the node list {text[:200]!r} is no list of hosts like n[1-3,07],b; export MASTER_ADDR, the name of rank 0's host, and MASTER_PORT"
    )
