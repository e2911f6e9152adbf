"""The table at the end of a run."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adakron.config import RunConfig
from adakron.tasks.base import Task
from adakron.tasks.classification import TextClassificationTask
from adakron.tasks.qa import QuestionTask
from adakron.trainable import ParameterReport


def summary_table(
    config: RunConfig, results: Mapping[str, Mapping[str, Any]], report: ParameterReport, folder: Path, *, inputs: Mapping[str, str]
) -> str:
    """Task, metrics, parameters, speed, memory, time, folder and what to type next, one line each. inputs: see `inputs_of`."""
    train, scores = results["train"], results["eval"]
    python = _interpreter()
    flags = "".join(f" {flag} {shlex.quote(value)}" for flag, value in inputs.items())
    predict = f"{python} launch/predict.py {shlex.quote(str(folder))}{flags}"
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
        *([("predict", predict)] if inputs else []),
        ("watch", f"tensorboard --logdir {shlex.quote(str(folder))}"),
    ]
    width = max(len(name) for name, _ in rows)
    body = [f"  {name:<{width}}  {value}" for name, value in rows]
    rule = "-" * min(100, max(len(line) for line in body))
    return "\n".join([rule, *body, rule])


def inputs_of(task: Task) -> dict[str, str]:
    """The flags that launch/predict.py takes single inputs of the task by, each with what may stand there; none where it takes none."""
    if isinstance(task, TextClassificationTask):
        pair = {"--text_pair": "its second text"} if len(task.spec.text_columns) == 2 else {}
        return {"--text": "your text", **pair}
    return {"--question": "your question", "--context": "where the answer is"} if isinstance(task, QuestionTask) else {}


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
