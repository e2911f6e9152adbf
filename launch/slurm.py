r"""Write a Slurm job script for a training run, and have Slurm check it.

    python launch/slurm.py --nodes 2 --gpus_per_node 8 --time 04:00:00 --script job.sbatch -- \
        --deepspeed ds_configs/zero2.json --task_name mrpc --data_dir DIR --output_dir RUN

Behind `--` stand the flags of launch/train.py. The job saves before its time is over, queues itself again and goes on. With
--array_tasks and --array_seeds, {task} and {seed} stand for their values. Where sbatch is there, `sbatch --test-only` tells what the
cluster thinks of the request. docs/multinode.md.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from adakron.atomic import publish
from adakron.errors import ConfigError
from adakron.launcher import World
from launch.arguments import Parser, parse_train
from launch.job_script import combinations, filled, job_script
from launch.program import execute, refuse_launcher

TEST_SECONDS = 60
"""How long Slurm's controller may take to answer."""

_OURS = ("--resume_from_checkpoint", "--overwrite_output_dir")
_NO_CLUSTER = re.compile(r"configuration source|Unable to contact slurm controller|Socket timed out")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def main(arguments: Sequence[str], world: World) -> None:
    """Write or print the script; check it where Slurm is."""
    refuse_launcher(world)
    own, training = split(arguments)
    options = parser().parse(own)
    flags, output_dir = _without_output_dir(training)
    problems = _problems(options)
    if output_dir is None:
        problems.append("the training has no --output_dir; behind --, name the folder that the job goes on in when it is queued again")
    else:
        problems += _training_problems(options, flags, output_dir)
    if output_dir is None or problems:
        raise ConfigError(problems)
    written_by = shlex.join(["python", "launch/slurm.py", *_without_script(own), "--", *training])
    text = job_script(options, flags, output_dir, written_by)
    if options.script is None:
        print(text, end="")
        return
    with publish(options.script) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(0o755)
    print(check_with_slurm(options.script))
    print(f"submit with: sbatch {shlex.quote(options.script)}")


def parser() -> Parser:
    """The flags of this program: sbatch's names, with underscores."""
    made = Parser((), __doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--script", metavar="FILE", help="Where to write the script. Default: print it.")
    made.add_argument("--nodes", type=int, default=1, help="Hosts. Default: 1.")
    made.add_argument("--gpus_per_node", type=int, help="GPUs per host; each gets a rank.")
    made.add_argument("--tasks_per_node", type=int, help="Ranks per host, on a cluster without GPUs.")
    made.add_argument("--cpus_per_task", type=int, help="Cores per rank. Default: the cluster's.")
    made.add_argument("--time", default="04:00:00", help="Time limit as sbatch has it. Default: 04:00:00.")
    for name in ("partition", "account", "qos", "constraint"):
        made.add_argument(f"--{name}", help="As sbatch has it. Default: the cluster's.")
    made.add_argument("--job_name", default="adakron", help="Default: adakron.")
    made.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="Any other option, as in --sbatch=--mem=64G.")
    made.add_argument("--signal_seconds", type=int, default=180, help="Save so long before the time limit; it is met to a minute.")
    made.add_argument("--max_restarts", type=int, default=20, help="Queue the job again so often at most. Default: 20.")
    made.add_argument("--venv", metavar="DIR", help="Virtual environment to activate. Default: the python of whoever submits.")
    made.add_argument("--container", metavar="IMAGE", help="Apptainer image to run in.")
    made.add_argument("--online", action="store_true", help="Let the ranks look models and data up on the hub.")
    made.add_argument("--array_tasks", nargs="+", default=[], metavar="TASK", help="A job for each task and seed, as an array.")
    made.add_argument("--array_seeds", nargs="+", default=[], metavar="SEED", help="The seeds of an array.")
    made.add_argument("--array_limit", type=int, help="So many jobs of the array at once.")
    return made


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """This program's flags, and those of the training behind `--`."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    training = words[at + 1 :]
    if training and training[0] in ("python", "python3"):
        del training[0]
    if training and not training[0].startswith("-"):
        if Path(training[0]).name != "train.py":
            raise ConfigError(
                f"{training[0]} is no training: behind -- stand the flags of launch/train.py, which alone goes on after a stop"
            )
        del training[0]
    return words[:at], training


def check_with_slurm(script: str) -> str:
    """What `sbatch --test-only` says; ConfigError where the cluster cannot run it."""
    if shutil.which("sbatch") is None:
        return f"{script} is written; there is no sbatch here to check it with"
    try:
        said = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True, timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{script} is written; Slurm did not answer within {TEST_SECONDS} s, so it is not checked"
    answer = " ".join((said.stderr + said.stdout).split())
    if _NO_CLUSTER.search(answer):
        return f"{script} is written; sbatch finds no cluster from here, so it is not checked ({answer})"
    if said.returncode:
        raise ConfigError(
            f"{script} is written, but sbatch --test-only fails ({answer}); ask for what the cluster has (sinfo), and write it again"
        )
    return f"{script} is written; {answer}"


def _problems(options: argparse.Namespace) -> list[str]:
    found = []
    if (options.gpus_per_node is None) == (options.tasks_per_node is None):
        found.append("give --gpus_per_node (a rank for each GPU), or --tasks_per_node on a cluster without GPUs, and not both")
    for name in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "array_limit", "signal_seconds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            found.append(f"--{name} is {value}; it must be at least 1")
    if options.max_restarts < 0:
        found.append(f"--max_restarts is {options.max_restarts}; it must be at least 0")
    limit = seconds(options.time)
    if limit is None:
        found.append(f"--time is {options.time!r}; give minutes, hours:minutes:seconds or days-hours:minutes:seconds")
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
    if "/" in options.job_name:  # Slurm ends such a job at its start, without a word
        found.append(f"--job_name is {options.job_name!r}; the job's log is named after it, so give it without /")
    found += [
        f"--sbatch is {one!r}; give an option of sbatch as one word, as in --sbatch=--mem=64G"
        for one in options.sbatch
        if not re.fullmatch(r"--?[a-z][\x21-\x7e]*", one)
    ]
    for name, values in (("venv", [options.venv]), ("container", [options.container]), ("array_tasks", options.array_tasks)):
        found += [f"--{name} is {value!r}; give it without control characters" for value in values if value and _CONTROL.search(value)]
    found += [
        f"seed {seed!r} is no whole number; give numbers (--array_seeds)"
        for seed in options.array_seeds
        if not (seed.isascii() and seed.isdecimal())
    ]
    return found


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


def _without_output_dir(training: Sequence[str]) -> tuple[list[str], str | None]:
    flags, found = [], None
    words = iter(training)
    for word in words:
        if word == "--output_dir":
            found = next(words, None)
        elif word.startswith("--output_dir="):
            found = word.partition("=")[2]
        else:
            flags.append(word)
    return flags, found or None


def _training_problems(options: argparse.Namespace, flags: Sequence[str], output_dir: str) -> list[str]:
    given = {word.partition("=")[0] for word in flags}
    found = [f"{flag} is the job script's to give, which goes on from the newest checkpoint; drop it" for flag in _OURS if flag in given]
    if any(_CONTROL.search(word) for word in (*flags, output_dir)):
        return ["the flags of the training hold control characters; give them on one line"]
    folders = set()
    ranks = options.nodes * (options.gpus_per_node or options.tasks_per_node or 1)
    for values in combinations(options):
        folder = filled(output_dir, values)
        folders.add(folder)
        words = [*(filled(word, values) for word in flags), "--output_dir", folder, "--resume_from_checkpoint", "auto"]
        try:
            too_few = parse_train(words).training.ranks_problem(ranks)
        except ConfigError as error:
            found += [problem for problem in error.problems if problem not in found]
        else:
            found += [too_few] if too_few and too_few not in found else []
    if len(folders) < len(combinations(options)):
        found.append(f"--output_dir {output_dir} is the same for several jobs of the array; put {{task}} and {{seed}} into it")
    return found


def _without_script(own: Sequence[str]) -> Iterator[str]:
    words = iter(own)
    for word in words:
        if word == "--script":
            next(words, None)
        elif not word.startswith("--script="):
            yield word


if __name__ == "__main__":
    execute(main)
