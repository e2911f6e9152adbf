"""Bytes that a rank gives to collectives in one training step, by ZeRO stage: `python -m tests.benchmarks.communication`.

Two ranks train a tiny BERT (`--model FOLDER` takes another one) for some steps per stage, with every collective of torch.distributed
counted. What a collective counts as: the larger of what goes in and what comes out. Where links are slow, what counts
is that adapters and head alone travel; at stage 3 the backbone is gathered besides, as it lies in parts on the ranks.
"""

import argparse
import collections
import contextlib
import functools
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import distributed_c10d

from adakron.launcher import World
from adakron.stopping import StopAgreement
from launch import train
from launch.program import execute
from tests.helpers import tiny
from tests.helpers.launch import ranks

STEPS, WARM_UP = 8, 3
JSONS = ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32", "zero2", "zero3")

REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor")
GATHERING = (
    "all_gather", "all_gather_single", "all_gather_into_tensor", "_all_gather_base", "all_gather_coalesced", "broadcast", "gather",
    "scatter", "all_to_all", "all_to_all_single",
)  # fmt: skip
Counts = collections.Counter[str]


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Inside, adds up the bytes given to each collective. Before DeepSpeed starts, which keeps some of the functions."""
    counts: Counts = collections.Counter()
    inside = [False]  # some of them call others

    def count(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def wrapped(*words: Any, **named: Any) -> Any:
            if inside[0]:
                return collective(*words, **named)
            given = inspect.signature(collective).bind(*words, **named).arguments.values()
            counts[name] += max(map(size, given), default=0)
            inside[0] = True
            try:
                return collective(*words, **named)
            finally:
                inside[0] = False

        return wrapped

    originals = {(module, name): getattr(module, name) for module in (dist, distributed_c10d) for name in (*REDUCING, *GATHERING)}
    try:
        for (module, name), collective in originals.items():
            setattr(module, name, count(name, collective))
        yield counts
    finally:
        for (module, name), collective in originals.items():
            setattr(module, name, collective)


def size(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of a list; 0 of anything else."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size, value)) if isinstance(value, list | tuple) else 0


def of_a_step(arguments: list[str], world: World) -> dict[str, float]:
    """Train; bytes per step and collective, from the steps after the first few."""
    at_boundaries: list[Counts] = []
    passed = StopAgreement.boundary
    with counted() as counts:

        def boundary(self: StopAgreement) -> None:
            at_boundaries.append(collections.Counter(counts))
            passed(self)

        StopAgreement.boundary = boundary  # type: ignore[method-assign]
        try:
            train.main([*arguments, "--max_steps", str(STEPS)], world)
        finally:
            StopAgreement.boundary = passed  # type: ignore[method-assign]
    first, last = at_boundaries[WARM_UP], at_boundaries[STEPS - 1]
    return {name: (last[name] - first[name]) / (STEPS - 1 - WARM_UP) for name in last if last[name] > first[name]}


def work(arguments: list[str], world: World) -> None:
    """One rank: all JSONs one after the other. Writes what it counted, and how many bytes train."""
    model, data, result, *jsons = arguments
    found = {}
    for name in jsons:
        run = Path(result).parent / name
        flags = [
            "--deepspeed", f"ds_configs/{name}.json", "--model_name_or_path", model, "--task_name", "sst2", "--data_dir", data,
            "--per_device_train_batch_size", "2", "--bottleneck_dim", "8", "--eval_strategy", "no", "--save_strategy", "no",
            "--logging_steps", "100", "--disable_tqdm", "yes", "--output_dir", str(run),
        ]  # fmt: skip
        found[name] = {"collectives": of_a_step(flags, world)}
        if world.rank == 0:
            found[name]["trained"] = sum(tensor.numel() for tensor in load_file(run / "adapter_model.safetensors").values())
    if world.rank == 0:
        Path(result).write_text(json.dumps(found))


def measure(model: Path, folder: Path, jsons: tuple[str, ...] = JSONS) -> dict[str, dict[str, Any]]:
    """By JSON: "collectives", rank 0's bytes per step, and "trained", how many numbers train."""
    data = tiny.write_classification(folder / "data")
    result = folder / "result.json"
    words = ["-m", "tests.benchmarks.communication", "--work", str(model), str(data), str(result), *jsons]
    with ranks(words, folder / "logs") as started:
        for rank in started:
            code, said = rank.end(900)
            assert code == 0, said[-4000:]
    content: dict[str, dict[str, Any]] = json.loads(result.read_text())
    return content


def split(collectives: Mapping[str, float]) -> tuple[float, float]:
    """Bytes that are reduced (gradients), and bytes that are gathered (parameters)."""
    return tuple(sum(collectives.get(name, 0.0) for name in names) for names in (REDUCING, GATHERING))  # type: ignore[return-value]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=None)
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        found = measure(model or tiny.save_tiny_bert(Path(folder) / "model", hidden_size=64), Path(folder))
    print("| JSON | numbers trained | reduced, bytes per step | gathered, bytes per step |\n|---|---|---|---|")
    for name, one in found.items():
        reduced, gathered = split(one["collectives"])
        print(f"| `{name}` | {one['trained']:,} | {reduced:,.0f} | {gathered:,.0f} |")
        print(f"{name}: {one['collectives']}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        del sys.argv[1]
        execute(work)
    main()
