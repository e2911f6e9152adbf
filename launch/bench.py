r"""Compare the speed and memory of this engine with its peers', on the same work, in one run.

    python launch/bench.py --task_name sst2 --data_dir DIR --precision bf16
    python launch/bench.py --suite --data_root DIR                              # all that has a target; DIR holds sst2/ and mrpc/

Each contender trains in a process of its own. They take turns: one round each, then the next round, so that whatever else the machine
does meets all of them. Medians, spreads (of the middle half of the rounds) and ratios are printed; --json keeps everything.
docs/performance.md.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate

import argparse
import contextlib
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from adakron import run_folder
from adakron.errors import ConfigError
from adakron.launcher import World
from adakron.weights import DTYPES
from launch.arguments import Parser
from launch.contenders import CONTENDERS, DEFAULT, tables
from launch.contenders.measuring import compare, read_libraries
from launch.contenders.plot import check_plot, draw
from launch.contenders.sizes import SIZES, save_backbone
from launch.contenders.suite import CASES, DEFAULT_FILE, report, run_suite
from launch.contenders.workload import Workload
from launch.program import execute, refuse_launcher

COUNTS = ("batch", "examples", "rounds", "max_seq_length")
OF_ONE = ("task_name", "data_dir", "model_name_or_path", "model_size", "precision", "contenders")
OF_SUITE = ("data_root", "cases")
EVALUATION_EXAMPLES = 512


def main(arguments: Sequence[str], world: World) -> None:
    """Run, print, keep."""
    refuse_launcher(world)
    options = parser().parse(arguments)
    _check(options)
    plot = Path(options.plot) if options.plot else None
    if plot is not None:
        check_plot(plot)
    if options.suite:
        _suite(options, plot)
    else:
        _one(options, plot)


def parser() -> Parser:
    """The flags."""
    made = Parser((), __doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    defaults = {name: one.default for name, one in Workload.__dataclass_fields__.items()}
    made.add_argument("--task_name", help="Task, as of launch/train.py. Default: quickstart.")
    made.add_argument("--data_dir", help="Its data.")
    made.add_argument("--model_name_or_path", help="Backbone. Default: the packaged MiniLM.")
    made.add_argument("--model_size", choices=SIZES, help="A backbone of this size with random weights, made for the occasion.")
    made.add_argument("--precision", choices=sorted(DTYPES), help="Default: bf16.")
    for name in COUNTS:
        made.add_argument(f"--{name}", type=int, help=f"Default: {defaults[name]}; of the suite: each case's own.")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="Of each contender. Default: all cores.")
    made.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help=f"Default: {' '.join(DEFAULT)}.")
    made.add_argument(
        "--evaluation", nargs="?", type=int, const=EVALUATION_EXAMPLES, metavar="N",
        help=f"Also score the validation split's first N examples. Default of N: {EVALUATION_EXAMPLES}.",
    )  # fmt: skip
    made.add_argument("--suite", action="store_true", help="Compare all that has a target, and say which are met.")
    made.add_argument("--data_root", help="Of the suite: the folder that holds a folder of data for each task.")
    made.add_argument("--cases", nargs="+", choices=list(CASES), help="Of the suite. Default: all.")
    made.add_argument("--json", metavar="FILE", help=f"Keep every number there. Default of the suite: {DEFAULT_FILE}.")
    made.add_argument("--plot", metavar="FILE", help="Draw samples/s there, as .png or .svg; needs matplotlib.")
    return made


def _check(options: argparse.Namespace) -> None:
    numbers = {name: getattr(options, name) for name in (*COUNTS, "threads", "evaluation")}
    problems = [f"--{name} is {number}; it must be at least 1" for name, number in numbers.items() if number is not None and number < 1]
    if options.json and not Path(options.json).parent.is_dir():
        problems.append(f"--json is {options.json}, and there is no folder {Path(options.json).parent}; make it, or name another file")
    problems += [
        f"--{name} is {file}, which is a folder; name a file in it"
        for name, file in (("json", options.json), ("plot", options.plot))
        if file and Path(file).is_dir()
    ]
    if options.model_size and options.model_name_or_path:
        problems.append("--model_size and --model_name_or_path both choose the backbone; drop one of them")
    idle = [f"--{name}" for name in (OF_ONE if options.suite else OF_SUITE) if getattr(options, name) is not None]
    if idle:
        remedy = "drop it, or --suite" if options.suite else "add --suite, or drop it"
        problems.append(f"{', '.join(idle)} does nothing {'with' if options.suite else 'without'} --suite; {remedy}")
    if problems:
        raise ConfigError(problems)


def _numbers(options: argparse.Namespace) -> dict[str, Any]:
    """The counts that were given, as fields of Workload."""
    given = {**{name: getattr(options, name) for name in COUNTS}, "evaluation_examples": options.evaluation}
    return {name: number for name, number in given.items() if number is not None}


def _one(options: argparse.Namespace, plot: Path | None) -> None:
    chosen = options.contenders or DEFAULT
    with contextlib.ExitStack() as held:
        held.enter_context(contextlib.redirect_stdout(sys.stderr))  # what libraries say is no part of the document
        model = options.model_name_or_path
        if options.model_size is not None:
            model = held.enter_context(tempfile.TemporaryDirectory())
            save_backbone(options.model_size, Path(model))
        workload = Workload(
            options.task_name or "quickstart", options.data_dir, model, options.precision or "bf16", model_size=options.model_size,
            **_numbers(options),
        )  # fmt: skip
        workload.config()  # what is wrong with it is said before anything starts
        read_libraries(chosen)
        result = compare(workload, chosen, options.threads)
    print("\n".join(tables.document(result)))
    if options.json:
        run_folder.write_json(Path(options.json), result)
    if plot is not None:
        draw({f"{workload.task_name}, {workload.precision}": result}, plot)


def _suite(options: argparse.Namespace, plot: Path | None) -> None:
    file = Path(options.json or DEFAULT_FILE)
    file.parent.mkdir(exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):
        result = run_suite(options.cases or [*CASES], options.data_root or "", options.threads, _numbers(options), file)
    print("\n".join([*report(result), "", f"Every number: {file}"]))
    if plot is not None:
        draw(result["cases"], plot)


if __name__ == "__main__":
    execute(main)
