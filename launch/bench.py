r"""Compare the speed and memory of this engine with its peers', on the same work, in one run.

    python launch/bench.py --task_name sst2 --data_dir DIR --precision bf16

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
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adakron import run_folder
from adakron.errors import AdaKronError, ConfigError
from adakron.launcher import World
from adakron.weights import DTYPES
from launch.arguments import Parser
from launch.contenders import CONTENDERS
from launch.contenders.workload import Loaded, Workload, load, tokens
from launch.program import execute, refuse_launcher

PRODUCT_SECONDS = 0.5


@dataclass
class Measured:
    """One contender's rounds. peak_memory: in bytes."""

    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0


class Failed(AdaKronError, RuntimeError):
    """A contender ended by itself."""


def main(arguments: Sequence[str], world: World) -> None:
    """Run, print, keep."""
    refuse_launcher(world)
    options = parser().parse(arguments)
    chosen = options.contenders or list(CONTENDERS)
    workload = _workload(options)
    workload.config()  # what is wrong with it is said before anything starts
    loaded = load(workload)
    flop = flop_per_round(loaded)
    measured, products = measure(workload, chosen, options.threads)
    result = {
        "machine": machine(options.threads),
        "workload": workload.to_dict(),
        "useful_tokens_per_round": tokens(loaded.train),
        "flop_per_round": flop,
        "products_flop_per_second": statistics.median(products),
        "contenders": {name: {"seconds": one.seconds, "peak_memory": one.peak_memory} for name, one in measured.items()},
    }
    print("\n".join(table(result)))
    if options.json:
        run_folder.write_json(Path(options.json), result)


def parser() -> Parser:
    """The flags."""
    made = Parser((), __doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    defaults = {name: one.default for name, one in Workload.__dataclass_fields__.items()}
    made.add_argument("--task_name", default="quickstart", help="Task, as of launch/train.py. Default: quickstart.")
    made.add_argument("--data_dir", help="Its data.")
    made.add_argument("--model_name_or_path", help="Backbone. Default: the packaged MiniLM.")
    made.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="Default: bf16.")
    for name in ("batch", "examples", "rounds", "max_seq_length"):
        made.add_argument(f"--{name}", type=int, default=defaults[name], help=f"Default: {defaults[name]}.")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="Of each contender. Default: all cores.")
    made.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="Default: all.")
    made.add_argument("--json", metavar="FILE", help="Keep every number there.")
    return made


def _workload(options: argparse.Namespace) -> Workload:
    counts = ("batch", "examples", "rounds", "max_seq_length", "threads")
    problems = [f"--{name} is {getattr(options, name)}; it must be at least 1" for name in counts if getattr(options, name) < 1]
    if options.json and not Path(options.json).parent.is_dir():
        problems.append(f"--json is {options.json}, and there is no folder {Path(options.json).parent}; make it, or name another file")
    if problems:
        raise ConfigError(problems)
    return Workload(
        options.task_name, options.data_dir, options.model_name_or_path, options.precision, batch=options.batch, examples=options.examples,
        rounds=options.rounds, max_seq_length=options.max_seq_length,
    )  # fmt: skip


def flop_per_round(loaded: Loaded) -> float:
    """What a round cannot do without: two products forward and two back (2 + 2 FLOP) for each parameter of a frozen linear layer and
    each useful token. Attention's own products, the adapters and the head are left out.
    """
    modules = loaded.model.named_modules()
    layers = [one for name, one in modules if isinstance(one, nn.Linear) and re.search(r"\.\d+\.", name)]  # the head has no number
    return 4.0 * sum(one.weight.numel() for one in layers) * tokens(loaded.train)


def measure(workload: Workload, chosen: Sequence[str], threads: int) -> tuple[dict[str, Measured], list[float]]:
    """All rounds of all contenders, in turn; and what bare matrix products reach between them, in FLOP per second."""
    measured = {name: Measured() for name in chosen}
    products: list[float] = []
    with contextlib.ExitStack() as held:
        processes = {name: held.enter_context(_started(name, workload, threads)) for name in chosen}
        for turn in range(workload.rounds + 1):
            for name, process in processes.items():
                done = _round(name, process)
                if turn:  # the first one warms up
                    measured[name].seconds.append(done["seconds"])
                measured[name].peak_memory = done["peak_memory"]
            products.append(product_speed(DTYPES[workload.precision], threads))
    return measured, products


@contextlib.contextmanager
def _started(name: str, workload: Workload, threads: int) -> Iterator["subprocess.Popen[str]"]:
    words = [sys.executable, "-m", "launch.contenders.run", name, json.dumps(workload.to_dict())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _round(name: str, process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("go\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise Failed(f"{CONTENDERS[name].name} ended with code {process.wait()}; what it said stands above; leave it out with --contenders")
    answer: dict[str, Any] = json.loads(line)
    return answer


def product_speed(dtype: torch.dtype, threads: int) -> float:
    """FLOP per second of products of 1024 by 1024, by 4096 rows: what a step cannot exceed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    left, right = torch.randn(4096, 1024, device=device, dtype=dtype), torch.randn(1024, 1024, device=device, dtype=dtype)
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < PRODUCT_SECONDS:
        nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count * 2 * 4096 * 1024 * 1024 / elapsed


def machine(threads: int) -> dict[str, Any]:
    """Where it was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    model = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "threads": threads, "gpu": gpu, **run_folder.environment()}


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def table(result: Mapping[str, Any]) -> list[str]:
    """The result as Markdown, the fastest first."""
    work, useful, flop = result["workload"], result["useful_tokens_per_round"], result["flop_per_round"]
    limit = result["products_flop_per_second"]
    ours = statistics.median(result["contenders"]["adakron"]["seconds"]) if "adakron" in result["contenders"] else None
    lines = [
        f"{work['task_name']}, {work['examples']} examples, batch {work['batch']}, {work['precision']},"
        f" {result['machine']['threads']} threads, {work['rounds']} rounds in turn; matrix products reach {limit / 1e9:,.0f} GFLOP/s",
        "",
        "| | samples/s | spread | useful tokens/s | of the limit | peak memory | this engine is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    medians = {name: statistics.median(one["seconds"]) for name, one in result["contenders"].items()}
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        one = result["contenders"][name]
        quartiles = statistics.quantiles(one["seconds"], n=4) if len(one["seconds"]) > 1 else [seconds] * 3
        ratio = f"{seconds / ours:.2f}" if ours is not None else ""
        lines.append(
            f"| {CONTENDERS[name].name} | {work['examples'] / seconds:,.0f} | {100 * (quartiles[2] - quartiles[0]) / seconds:.0f} % |"
            f" {useful / seconds:,.0f} | {100 * flop / seconds / limit:.0f} % | {one['peak_memory'] / 2**20:,.0f} MiB | {ratio} |"
        )
    return lines


if __name__ == "__main__":
    execute(main)
