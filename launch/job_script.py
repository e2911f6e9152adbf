"""The text of a Slurm job script: `launch/slurm/template.sh` with the requests, the environment and the training of one job filled in."""

import argparse
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TEMPLATE = Path(__file__).resolve().parent / "slurm" / "template.sh"
HEAD = "# Written by launch/slurm.py"
"""How a script of ours begins, behind its first line."""

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")


def job_script(options: argparse.Namespace, flags: Sequence[str], output_dir: str, written_by: str) -> str:
    """The script of a job. options: of launch/slurm.py, checked. flags: of the training. written_by: the command, for its head."""
    parts = {
        "written_by": written_by,
        "sbatch": "\n".join(f"#SBATCH {line}" for line in _requests(options)),
        "environment": "\n".join(_environment(options)),
        "run": "\n".join(_run(options, output_dir)),
        "command": "\n".join(f"    {line}" for line in _command(options, flags)),
        "max_restarts": str(options.max_restarts),
    }
    return re.sub(r"@([a-z_]+)@", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def combinations(options: argparse.Namespace) -> list[dict[str, str]]:
    """Tasks and seeds of the jobs of an array, in the order of their numbers."""
    named = {name: values for name, values in (("task", options.array_tasks), ("seed", options.array_seeds)) if values}
    return [dict(zip(named, values, strict=True)) for values in itertools.product(*named.values())]


def filled(word: str, values: Mapping[str, str]) -> str:
    """A word of the training's flags in one job of an array."""
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _requests(options: argparse.Namespace) -> Iterator[str]:
    array = len(combinations(options)) if options.array_tasks or options.array_seeds else 0
    yield f"--job-name={options.job_name}"
    yield f"--nodes={options.nodes}"
    yield f"--ntasks-per-node={options.gpus_per_node or options.tasks_per_node}"
    for name in ("gpus_per_node", "cpus_per_task", "partition", "account", "qos", "constraint"):
        if getattr(options, name) is not None:
            yield f"--{name.replace('_', '-')}={getattr(options, name)}"
    yield f"--time={options.time}"
    if array:
        yield f"--array=0-{array - 1}" + (f"%{options.array_limit}" if options.array_limit else "")
    yield f"--output=slurm-%x-{'%A_%a' if array else '%j'}.out"
    yield "--open-mode=append"
    yield "--requeue"
    yield f"--signal=B:USR1@{options.signal_seconds}"
    yield from options.sbatch


def _environment(options: argparse.Namespace) -> Iterator[str]:
    yield from options.setup
    if options.venv:
        activate = shlex.quote(f"{options.venv}/bin/activate")
        yield f'[ -f {activate} ] || {{ echo {activate} on "$(hostname)" is no virtual environment: --venv >&2; exit 2; }}'
        yield "# shellcheck disable=SC1091"
        yield f"source {activate} || exit 2"
    if options.container:
        yield 'command -v apptainer >/dev/null || { echo "there is no apptainer on $(hostname) to start --container with" >&2; exit 2; }'
    if not options.online:
        yield "# Compute nodes without a way to the hub would wait for it."
        yield f"export {' '.join(f'{name}=1' for name in OFFLINE)}"


def _run(options: argparse.Namespace, output_dir: str) -> Iterator[str]:
    index = "SLURM_ARRAY_TASK_ID"
    if options.array_tasks:
        yield f"tasks=({shlex.join(options.array_tasks)})"
        yield f"task=${{tasks[{index}{f' / {len(options.array_seeds)}' if options.array_seeds else ''}]}}"
    if options.array_seeds:
        yield f"seeds=({shlex.join(options.array_seeds)})"
        yield f"seed=${{seeds[{index} % {len(options.array_seeds)}]}}"
    yield f"run_dir={_quoted(output_dir, options)}"


def _command(options: argparse.Namespace, flags: Sequence[str]) -> Iterator[str]:
    if options.container:
        yield f"apptainer exec --nv {shlex.quote(options.container)}"
    yield "python -u launch/train.py"
    words = [_quoted(word, options) for word in flags]
    while words:  # a flag and its values on a line
        count = next((at for at, word in enumerate(words[1:], 1) if word.startswith("--")), len(words))
        yield " ".join(words[:count])
        del words[:count]
    yield '"$@" --output_dir "$run_dir" --resume_from_checkpoint auto'


def _quoted(word: str, options: argparse.Namespace) -> str:
    """A word for bash, in which {task} and {seed} of an array are the variables."""
    names = [name for name, values in (("task", options.array_tasks), ("seed", options.array_seeds)) if values]
    pieces = re.split(rf"\{{({'|'.join(names)})\}}", word) if names else [word]
    if len(pieces) == 1:
        return shlex.quote(word)
    return "".join(f'"${piece}"' if at % 2 else shlex.quote(piece) if piece else "" for at, piece in enumerate(pieces))
