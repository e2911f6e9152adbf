"""The comparisons that the targets are about, one after the other: `launch/bench.py --suite`."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adakron import run_folder
from adakron.errors import ConfigError
from adakron.log import get_logger
from launch.contenders import CONTENDERS, targets
from launch.contenders.measuring import compare, read_libraries
from launch.contenders.sizes import save_backbone
from launch.contenders.tables import document
from launch.contenders.workload import Workload

logger = get_logger(__name__)

DEFAULT_FILE = Path("runs") / "bench.json"


@dataclass(frozen=True)
class Case:
    """task: its data are the folder of that name. model_size: of `sizes.SIZES`; None: the packaged MiniLM with its weights. See
    `Workload` for the numbers.
    """

    task: str
    precision: str
    contenders: tuple[str, ...]
    examples: int
    rounds: int = 5
    model_size: str | None = None
    evaluation_examples: int = 0


CASES = {
    targets.SST2: Case(
        "sst2", "bf16", ("adakron", "plain_fast", "plain", "hf_lora", "published", "adakron_2ranks"), 256, evaluation_examples=512
    ),
    targets.SST2_FP32: Case("sst2", "fp32", ("adakron", "plain_fast", "hf_lora"), 256),
    targets.MRPC: Case("mrpc", "bf16", ("adakron", "plain_fast", "hf_lora"), 128),
    targets.ROBERTA: Case("sst2", "bf16", ("adakron", "plain_fast", "hf_lora"), 128, rounds=4, model_size="roberta-base"),
}
"""Sized for less than 15 minutes on two idle cores, all together."""


def run_suite(chosen: Sequence[str], data_root: str, threads: int, numbers: Mapping[str, int], file: Path) -> dict[str, Any]:
    """All chosen cases and what they say of the targets. file: gets the result as JSON, after each case anew.

    numbers: of `Workload`, in the place of the cases' own. Raises ConfigError where data are missing.
    """
    check_data(chosen, data_root)
    read_libraries([*CONTENDERS])
    results: dict[str, Any] = {}
    for place, name in enumerate(chosen, 1):
        logger.info("case %d of %d: %s", place, len(chosen), name)
        results[name] = _measured(CASES[name], data_root, threads, numbers)
        judged = [target.judge(results) for target in targets.TARGETS]
        run_folder.write_json(file, {"cases": results, "targets": judged})
    return {"cases": results, "targets": judged}


def check_data(chosen: Sequence[str], data_root: str) -> None:
    """ConfigError where the folder of a task is missing."""
    tasks = sorted({CASES[name].task for name in chosen})
    missing = [task for task in tasks if not data_root or not (Path(data_root) / task).is_dir()]
    if missing:
        got = f"{data_root}, where there is no {', '.join(missing)}" if data_root else "not given"
        raise ConfigError(
            f"--data_root is {got}; the suite needs {' and '.join(tasks)}, folders with train and validation files: name the folder that"
            " holds them with --data_root DIR, or make bench DATA_ROOT=DIR"
        )


def _measured(case: Case, data_root: str, threads: int, numbers: Mapping[str, int]) -> dict[str, Any]:
    with contextlib.ExitStack() as held:
        model = None
        if case.model_size is not None:
            model = held.enter_context(tempfile.TemporaryDirectory())
            save_backbone(case.model_size, Path(model))
        workload = Workload(
            case.task, os.path.join(data_root, case.task), model, case.precision, examples=case.examples, rounds=case.rounds,
            model_size=case.model_size, evaluation_examples=case.evaluation_examples,
        )  # fmt: skip
        known: dict[str, Any] = {
            name: number for name, number in numbers.items() if name != "evaluation_examples" or case.evaluation_examples
        }
        return compare(dataclasses.replace(workload, **known), [name for name in case.contenders if _has_devices(name)], threads)


def _has_devices(name: str) -> bool:
    """Whether there is a GPU for every rank, or none at all."""
    return not torch.cuda.is_available() or torch.cuda.device_count() >= CONTENDERS[name].ranks


def report(result: Mapping[str, Any]) -> list[str]:
    """The whole document."""
    first = next(iter(result["cases"].values()))["machine"]
    lines = [
        "# Benchmark", "",
        f"{first['gpu'] or first['cpu']}, {first['cores']} cores, {first['threads']} threads, torch {first['packages']['torch']}",
        "", "## Targets", "", *targets.table(result["targets"]),
    ]  # fmt: skip
    for name, one in result["cases"].items():
        lines += ["", f"## {name}", "", *document(one)]
    return lines
