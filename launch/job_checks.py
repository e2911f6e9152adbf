"""What is checked of a job before its script is written: the request, the training's flags, and what is not there."""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from adakron.config import DATA_FILES
from adakron.engine import ds_config
from adakron.errors import ConfigError
from launch.arguments import parse_train
from launch.job_script import HEAD, combinations, filled

_OURS = ("--resume_from_checkpoint", "--overwrite_output_dir")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FLAG_OF = {
    "signal": "--signal_seconds", "time": "--time", "t": "--time", "nodes": "--nodes", "N": "--nodes",
    "array": "--array_tasks, --array_seeds",
    "a": "--array_tasks, --array_seeds", "ntasks-per-node": "--tasks_per_node", "gpus-per-node": "--gpus_per_node", "requeue": None,
    "no-requeue": "--max_restarts 0", "open-mode": None,
}  # fmt: skip
"""What the script needs as it is, and the flag that sets it; None: nothing does."""


def seconds(time: str) -> int | None:
    """Seconds of a time limit as sbatch reads it: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s; None where it is none."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, secs = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, secs = numbers
    else:
        hours, minutes, secs = 0, *(*numbers, 0)[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs


def request_problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of launch/slurm.py itself."""
    found = []
    if options.gpus_per_node is None and options.tasks_per_node is None:
        found.append("how many ranks a node has is not given; give --gpus_per_node, or --tasks_per_node on a cluster without GPUs")
    if options.gpus_per_node is not None and options.tasks_per_node is not None:
        found.append("--gpus_per_node and --tasks_per_node are both given; each GPU gets a rank: drop --tasks_per_node")
    for name in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "array_limit", "signal_seconds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            found.append(f"--{name} is {value}; it must be at least 1")
    if options.max_restarts < 0:
        found.append(f"--max_restarts is {options.max_restarts}; it must be at least 0")
    limit = seconds(options.time)
    if limit is None:
        found.append(f"--time is {options.time!r}; give minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    elif options.signal_seconds >= limit:
        found.append(f"--signal_seconds {options.signal_seconds} leaves nothing of a time limit of {limit} s; give more --time")
    if options.venv and options.container:
        found.append("--venv and --container exclude each other: a container has its own Python; drop one")
    if options.array_limit and not (options.array_tasks or options.array_seeds):
        found.append("--array_limit does nothing without --array_tasks or --array_seeds; drop it")
    for name in ("partition", "account", "qos", "constraint", "job_name"):
        value = getattr(options, name)
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value):
            found.append(f"--{name} is {value!r}; a line of #SBATCH takes it without spaces")
    found += [
        f"--sbatch is {one!r}; give an option of sbatch as one word, as in --sbatch=--mem=64G"
        for one in options.sbatch
        if not re.fullmatch(r"--?[a-z][\x21-\x7e]*", one)
    ]
    for one in options.sbatch:
        name = one.lstrip("-").partition("=")[0]
        if name in _FLAG_OF:
            flag = _FLAG_OF[name]
            found.append(f"--sbatch is {one!r}, which the script decides; {f'give {flag}' if flag else 'drop it'}")
    texts = {"venv": [options.venv], "container": [options.container], "array_tasks": options.array_tasks, "setup": options.setup}
    for name, values in texts.items():
        found += [f"--{name} is {value!r}; give it without control characters" for value in values if value and _CONTROL.search(value)]
    found += [
        f"seed {seed!r} is no whole number; give numbers (--array_seeds)"
        for seed in options.array_seeds
        if not (seed.isascii() and seed.isdecimal())
    ]
    return found


def training_problems(options: argparse.Namespace, flags: Sequence[str], output_dir: str) -> list[str]:
    """What is wrong with the training of any job."""
    given = {word.partition("=")[0] for word in flags}
    found = [f"{flag} is the job script's to give, which goes on from the newest checkpoint; drop it" for flag in _OURS if flag in given]
    if any(_CONTROL.search(word) for word in (*flags, output_dir)):
        return ["the flags of the training hold control characters; give them on one line"]
    folders = set()
    for values in combinations(options):
        words = [filled(word, values) for word in (*flags, "--output_dir", output_dir)]
        folders.add(words[-1])
        try:
            ds_config.read_json(parse_train(words).deepspeed)
        except ConfigError as error:
            found += [problem for problem in error.problems if problem not in found]
    if len(folders) < len(combinations(options)):
        found.append(f"--output_dir {output_dir} is the same for several jobs of the array; put {{task}} and {{seed}} into it")
    for name, values in (("task", options.array_tasks), ("seed", options.array_seeds)):
        if values and not any(f"{{{name}}}" in word for word in flags):
            found.append(f"--array_{name}s is given, and no flag of the training has {{{name}}}: jobs would train the same; put it there")
    return found


def script_problems(script: str | None) -> list[str]:
    """What is wrong with the place that the script goes to. Only a script of ours is written over."""
    if script is None:
        return []
    file = Path(script)
    if not file.parent.is_dir():
        return [f"--script is {script}, and there is no folder {file.parent}; make it, or name another place"]
    if file.is_dir():
        return [f"--script is {script}, a folder; name a file in it"]
    if file.exists() and HEAD not in file.read_text(encoding="utf-8", errors="replace")[:1000]:
        return [f"--script is {script}, a file that this program did not write; name another one, or move it away"]
    return []


def not_here(options: argparse.Namespace, flags: Sequence[str]) -> Iterator[str]:
    """A line for each thing that the job needs and this host has not; its own hosts may have it."""
    named = {"--venv": options.venv and f"{options.venv}/bin/activate", "--container": options.container}
    for flag, value in named.items():
        if value and not Path(value).exists():
            yield f"{flag}: there is no {value} here; the job needs it on its hosts"
    seen = set()
    for values in combinations(options):
        data = parse_train([filled(word, values) for word in flags]).data
        for name in DATA_FILES:
            value = getattr(data, name)
            if value and value not in seen and not Path(value).expanduser().exists():
                yield f"--{name}: there is no {value} here; the job needs it on its hosts"
            seen.add(value)
