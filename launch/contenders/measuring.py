"""Starts contenders and lets them take turns; what bare matrix products reach between their rounds."""

import contextlib
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adakron import run_folder
from adakron.errors import AdaKronError
from adakron.weights import DTYPES
from launch.contenders import CONTENDERS
from launch.contenders.workload import Loaded, Workload, load, tokens

PRODUCT_SECONDS = 0.5


@dataclass
class Measured:
    """One contender. seconds: of its timed rounds. peak_memory: of all its processes, in bytes. start_seconds: see `pace.Round`.
    phases_ms: medians over the steps of its traced round, on rank 0. evaluation_seconds: of its rounds of scoring.
    """

    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0
    start_seconds: float = 0.0
    phases_ms: dict[str, float] = field(default_factory=dict)
    evaluation_seconds: list[float] = field(default_factory=list)


class Failed(AdaKronError, RuntimeError):
    """A contender ended by itself."""


def compare(workload: Workload, chosen: Sequence[str], threads: int) -> dict[str, Any]:
    """Everything that is measured of a workload, for JSON. The result's workload has no more examples than there are."""
    loaded = load(workload)
    scored = len(loaded.validation) if loaded.validation is not None else 0
    workload = replace(workload, examples=len(loaded.train), evaluation_examples=scored)
    useful, flop = tokens(loaded.train), flop_per_round(loaded)
    del loaded  # its memory is the contenders'
    measured, products = measure(workload, chosen, threads)
    return {
        "machine": machine(threads),
        "workload": workload.to_dict(),
        "useful_tokens_per_round": useful,
        "flop_per_round": flop,
        "products_flop_per_second": statistics.median(products),
        "contenders": {name: asdict(one) for name, one in measured.items()},
    }


def flop_per_round(loaded: Loaded) -> float:
    """The same for all contenders: two products forward and two back (2 + 2 FLOP) for each parameter of a frozen linear layer and each
    useful token. Attention's own products, the adapters and the head are left out; so is that a last layer whose head reads one token
    can do with less, as this engine's does.
    """
    modules = loaded.model.named_modules()
    layers = [one for name, one in modules if isinstance(one, nn.Linear) and re.search(r"\.\d+\.", name)]  # the head has no number
    return 4.0 * sum(one.weight.numel() for one in layers) * tokens(loaded.train)


def measure(workload: Workload, chosen: Sequence[str], threads: int) -> tuple[dict[str, Measured], list[float]]:
    """All rounds of all contenders, in turn; and what bare matrix products reach between them, in FLOP per second.

    Each is started when the first turn comes to it: nothing else runs from its start to its first step.
    """
    measured = {name: Measured() for name in chosen}
    products: list[float] = []
    with contextlib.ExitStack() as held:
        running: dict[str, _Running] = {}
        for turn in range(workload.passes):
            timed = 0 < turn <= workload.rounds  # the first one warms up, the last one is traced
            for name, one in measured.items():
                if not turn:
                    running[name] = held.enter_context(_started(name, workload, threads))
                done = running[name].round()
                one.start_seconds, one.phases_ms = done["start_seconds"], done["phases"]
                if timed:
                    one.seconds.append(done["seconds"])
                    one.peak_memory = done["peak_memory"]
            if timed:
                products.append(product_speed(DTYPES[workload.precision], threads))
        for turn in range(workload.rounds + 1 if workload.evaluation_examples else 0):
            for name, one in measured.items():
                done = running[name].round()
                if turn:
                    one.evaluation_seconds.append(done["seconds"])
    return measured, products


@dataclass(frozen=True)
class _Running:
    """A contender's processes, by rank."""

    name: str
    processes: Sequence["subprocess.Popen[str]"]

    def round(self) -> dict[str, Any]:
        """Let it do one. Of several ranks: the first one's numbers, the memory of all."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("go\n")
                process.stdin.flush()
        answers = [self._answer(process) for process in self.processes]
        return {**answers[0], "peak_memory": sum(answer["peak_memory"] for answer in answers)}

    def _answer(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            raise Failed(f"{self.name} ended with code {code}; what it said stands above; leave it out with --contenders")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def _started(name: str, workload: Workload, threads: int) -> Iterator[_Running]:
    one, processes = CONTENDERS[name], []
    share = max(1, threads // one.ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(share), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= _visible(one.ranks)
    port = _free_port() if one.ranks > 1 else 0
    words = [sys.executable, "-m", "launch.contenders.run", name, json.dumps(workload.to_dict()), repr(time.monotonic())]
    try:
        for rank in range(one.ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": one.ranks, "LOCAL_WORLD_SIZE": one.ranks, "MASTER_PORT": port}
            variables = {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"} if one.ranks > 1 else {}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(words, env=environment | variables, **pipes))
        yield _Running(one.name, processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def _visible(ranks: int) -> dict[str, str]:
    """The variable that shows a contender one GPU for each rank: transformers' Trainer would divide its batch among all that it sees."""
    count = torch.cuda.device_count()
    if count <= ranks:
        return {}
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(shown[:ranks])}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_libraries(chosen: Sequence[str]) -> None:
    """Let the operating system read the libraries once, and kernels be compiled that were not yet: else the first contender alone would
    wait for that when it starts.
    """
    modules = sorted({f"launch.contenders.{CONTENDERS[name].place[0]}" for name in chosen})
    kernels = "" if torch.cuda.is_available() else "; from adakron.nn import native; native.load()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # What is wrong with them is said by the contender itself.
    subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}{kernels}"], env=environment, capture_output=True, check=False)


def product_speed(dtype: torch.dtype, threads: int) -> float:
    """FLOP per second of matrix products, which a step cannot exceed: of 4096 rows by 1024 by 1024; on a GPU, which would wait for the
    host between these, of 8192 by 8192 by 8192.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    rows, width, in_a_row = (8192, 8192, 10) if on_gpu else (4096, 1024, 1)
    torch.set_num_threads(threads)
    left, right = torch.randn(rows, width, device=device, dtype=dtype), torch.randn(width, width, device=device, dtype=dtype)
    nn.functional.linear(left, right)  # the first one prepares
    if on_gpu:
        torch.cuda.synchronize()
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < PRODUCT_SECONDS:
        for _ in range(in_a_row):
            nn.functional.linear(left, right)
        if on_gpu:
            torch.cuda.synchronize()
        count += in_a_row
    return count * 2 * rows * width * width / elapsed


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
