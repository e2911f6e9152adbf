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
from launch.arguments import Parser
from launch.job_checks import not_here, request_problems, script_problems, training_problems
from launch.job_script import job_script
from launch.program import execute, refuse_launcher

TEST_SECONDS = 60
"""How long Slurm's controller may take to answer."""

_NO_CLUSTER = re.compile(r"configuration source|Unable to contact slurm controller|Socket timed out")


def main(arguments: Sequence[str], world: World) -> None:
    """Write or print the script; check it where Slurm is."""
    refuse_launcher(world)
    own, training = split(arguments)
    options = parser().parse(own)
    if "--" not in arguments:
        raise ConfigError("there is no -- among the arguments; put it before the flags of the training, as in --nodes 2 -- --task_name ...")
    flags, output_dir = _without_output_dir(training)
    problems = request_problems(options) + script_problems(options.script)
    if output_dir is None:
        problems.append("the training has no --output_dir; behind --, name the folder that the job goes on in when it is queued again")
    else:
        problems += training_problems(options, flags, output_dir)
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
    for note in not_here(options, flags):
        print(note)
    print(check_with_slurm(options.script))
    print(f"submit with: sbatch {shlex.quote(options.script)}")


class _Parser(Parser):
    def unknown(self, token: str) -> str:
        """An option of sbatch may be meant that has no flag here."""
        return f"{super().unknown(token)}, or give sbatch's own as --sbatch={token.split('=')[0]}=VALUE"


def parser() -> Parser:
    """The flags of this program: sbatch's names, with underscores."""
    made = _Parser((), __doc__ or "")
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
    made.add_argument("--setup", action="append", default=[], metavar="COMMAND", help="A line of shell before all, as 'module load cuda'.")
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


def _without_script(own: Sequence[str]) -> Iterator[str]:
    words = iter(own)
    for word in words:
        if word == "--script":
            next(words, None)
        elif not word.startswith("--script="):
            yield word


if __name__ == "__main__":
    execute(main)
