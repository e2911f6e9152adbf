"""The table at the end of a run."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adakron.config import RunConfig
from adakron.tasks.base import Task
from adakron.tasks.causal import PairTask
from adakron.tasks.classification import TextClassificationTask
from adakron.tasks.ner import NerTask
from adakron.tasks.qa import QuestionTask
from adakron.trainable import ParameterReport


def summary_table(config: RunConfig, results: Mapping[str, Mapping[str, Any]], report: ParameterReport, folder: Path, task: Task) -> str:
    """Task, metrics, parameters, speed, memory, time, folder and what to type next, one line each."""
    train, scores = results["train"], results["eval"]
    python = _interpreter()
    uses = [
        (name, " ".join([python, f"launch/{name}.py", shlex.quote(str(folder)), *map(shlex.quote, words)]))
        for name, words in programs_for(task).items()
    ]
    rows = [("task", f"{config.data.task_name} ({config.adapter.method}, seed {config.training.seed})")]
    rows += [(name, f"{value:.4f}") for name, value in scores.items() if name.startswith("eval_") and not _is_cost(name)]
    rows += [
        ("train loss", f"{train['train_loss']:.4f}"),
        ("adapter parameters", f"{report.adapter:,} ({100 * report.adapter / report.backbone:.3f} % of the backbone)"),
        ("head parameters", f"{report.head:,} ({100 * report.head / report.backbone:.3f} %)"),
        ("backbone parameters", f"{report.backbone:,} ({_trained_share(report)})"),
        ("speed", f"{train['train_samples_per_second']:.1f} samples/s, {train['train_tokens_per_second']:,.0f} tokens/s (without padding)"),
        ("peak memory", f"{train['peak_memory_mib']:,.0f} MiB per rank"),
        ("wall time", wall_time(train)),
        ("output folder", str(folder)),
        ("evaluate", f"{python} launch/evaluate.py {shlex.quote(str(folder))}"),
        *uses,
        ("watch", f"tensorboard --logdir {shlex.quote(str(folder))}"),
    ]
    width = max(len(name) for name, _ in rows)
    body = [f"  {name:<{width}}  {value}" for name, value in rows]
    rule = "-" * min(100, max(len(line) for line in body))
    return "\n".join([rule, *body, rule])


def programs_for(task: Task) -> dict[str, list[str]]:
    """The programs of launch/ that use what the task has trained, by name, with the flags of an input and what may stand behind them."""
    if isinstance(task, TextClassificationTask):
        pair = ["--text_pair", "its second text"] if len(task.spec.text_columns) == 2 else []
        return {"predict": ["--text", "your text", *pair]}
    if isinstance(task, QuestionTask):
        return {"predict": ["--question", "your question", "--context", "where the answer is"]}
    if isinstance(task, NerTask):
        return {"predict": ["--test_file", "new.conll"]}
    return {"generate": ["--text", "your source"]} if isinstance(task, PairTask) else {}


def wall_time(train: Mapping[str, Any]) -> str:
    """How long it took, by train_results.json: wall_seconds is this process alone, train_runtime the training of those before it, too."""
    wall, training = f"{train['wall_seconds']:.1f} s", f"{train['train_runtime']:.1f} s"
    step = train["resumed_from_step"]
    return f"{wall} since it went on at step {step}; {training} of training in all" if step else f"{wall}, {training} of it training"


def _trained_share(report: ParameterReport) -> str:
    return f"{report.tuned:,} trained, {100 * report.tuned / report.backbone:.3f} %" if report.tuned else "frozen"


def _is_cost(name: str) -> bool:
    return name.endswith(("_runtime", "_samples", "_samples_per_second"))


def _interpreter() -> str:
    # What can be typed as it stands: the environment that `make` made is not on everybody's PATH.
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd())) if executable.is_relative_to(Path.cwd()) else "python"
