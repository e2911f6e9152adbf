"""launch/predict.py with several saved runs on one backbone: every text is predicted by the run that it names, all in one pass."""

import argparse
import csv
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from adakron import adapter_folder, backbone, distributed, models
from adakron.adapter_folder import AdapterFolder
from adakron.bank import AdapterBank
from adakron.config import DataConfig, RunConfig
from adakron.data.collation import pad_batch
from adakron.errors import ConfigError, DataError
from adakron.evaluator import Evaluator
from adakron.launcher import World
from adakron.log import get_logger
from adakron.tasks import create_task
from adakron.tasks.base import Batch, EncodedSplit, Forward, Task
from adakron.tasks.classification import TextClassificationTask
from adakron.tasks.labels import LabelRule, check_split
from adakron.tasks.sources import load_raw_splits
from launch.saved_run import eval_batch_size, read_settings

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Run:
    """One of the runs. task: without data files; it encodes and describes single texts."""

    folder: Path
    config: RunConfig
    precision: torch.dtype
    saved: AdapterFolder
    task: TextClassificationTask


@dataclass(frozen=True)
class _Rows:
    """What to predict: texts (one sequence per text column) and the name of each row's run."""

    columns: Sequence[Sequence[str]]
    names: Sequence[str]


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of predictions with several runs."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=RUN",
        help="A further run on the same backbone, under a name; may be repeated. The first run's name is that of its folder.",
    )
    parser.add_argument("--adapter_name", action="append", help="With --adapter: the run for each --text, by name, once per --text.")
    parser.add_argument("--adapter_column", help="With --adapter: the column of --test_file that names the run for each row.")


def is_mixed(options: argparse.Namespace) -> bool:
    """Whether several runs are to predict. Raises ConfigError where the flags do not go together."""
    if not options.adapter:
        if options.adapter_name or options.adapter_column:
            raise ConfigError("--adapter_name and --adapter_column choose among several runs; name the others with --adapter NAME=RUN")
        return False
    problems = []
    if options.inference_level is not None:
        problems.append("--inference_level is for one run, and several keep their own; drop it")
    if options.text:
        texts, names = len(options.text), len(options.adapter_name or ())
        if names != texts:
            problems.append(f"--adapter_name is given {names} times for {texts} texts; give it once per --text, in their order")
        if options.text_pair and len(options.text_pair) != texts:
            problems.append(f"--text_pair is given {len(options.text_pair)} times for {texts} texts; give it once per --text, or never")
        if options.adapter_column:
            problems.append("--adapter_column belongs to --test_file; with --text use --adapter_name")
    else:
        if not options.adapter_column or not getattr(options, "test_file", None):
            problems.append("--adapter needs --text with --adapter_name, or --test_file with --adapter_column: which run is for which text")
        if options.adapter_name:
            problems.append("--adapter_name belongs to --text; with --test_file use --adapter_column")
        others = [name for name in ("data_dir", "train_file", "validation_file") if hasattr(options, name)]
        others += ["split"] if options.split else []
        problems += [f"--{name} is not used with several runs, which predict the rows of --test_file; drop it" for name in others]
    if problems:
        raise ConfigError(problems)
    return True


def predict_mixed(options: argparse.Namespace, world: World) -> None:
    """Print a prediction per --text, or write one per row of --test_file, each with its run's name and labels."""
    runs = {name: _open(options, folder) for name, folder in _folders(options).items()}
    _check_columns(runs, by_name=not options.text)
    first = next(iter(runs.values()))
    target = None if options.text else Path(options.output_dir or options.run_folder) / "predict_results_test.tsv"
    if target is not None and target.exists():
        raise ConfigError(f"{target} exists; choose another folder with --output_dir, or delete it")
    rows = _rows_of_file(options, first) if target else _Rows(
        [options.text] + ([options.text_pair] if options.text_pair else []), options.adapter_name
    )  # fmt: skip
    _check_names(rows, runs)
    device = distributed.select_device(world, os.environ)
    base = backbone.load_backbone(
        first.config.model, auto_class=first.saved.auto_class, options=first.saved.model_options, seed=0, device_type=device.type
    )
    bank = AdapterBank(base.model, base.tokenizer)
    for name, run in runs.items():
        bank.add(name, run.folder, seed=run.config.training.seed, allow_other_backbone=options.allow_other_backbone)
        if run.precision != first.precision:
            logger.warning(
                "run %s was trained in %s and is predicted in %s, the first run's precision", name, run.precision, first.precision
            )
    models.cast_parameters(base.model, first.precision)
    model: nn.Module = base.model
    model.to(device).eval()
    mixed = _MixedTask(rows, runs, base.tokenizer)
    distributed.form_group(world, device)
    evaluator = Evaluator(
        # Its `outputs` needs no more of a task than these batches and predictions.
        cast(Task, mixed),
        batch_size=eval_batch_size(options, first.config),
        pad_token_id=int(base.tokenizer.pad_token_id),
        device=device,
        world_size=world.world_size,
        rank=world.rank,
        before_batch=bank.evaluation_batch,
    )
    outputs = mixed.in_order(evaluator.outputs(bank, mixed.encoded))
    if world.rank != 0:
        return
    predictions = [(name, runs[name], row[None, : mixed.widths[name]]) for name, row in zip(rows.names, outputs, strict=True)]
    if target is None:
        for text, (name, run, row) in zip(options.text, predictions, strict=True):
            print(f"{name}\t{run.task.describe(row)[0]}\t{text}")
    else:
        _write(target, predictions)
        print(f"{len(predictions)} predictions in {target}")


class _MixedTask:
    """Batches of texts of several runs, and their logits from a bank.

    encoded: every row once, run after run, each cut to its own run's length. widths: number of logits of each run.
    """

    def __init__(self, rows: _Rows, runs: Mapping[str, _Run], tokenizer: PreTrainedTokenizerBase):
        self._names = list(runs)
        self.widths = {name: int(run.saved.model_options["num_labels"]) for name, run in runs.items()}
        self._multiple = next(iter(runs.values())).config.data.pad_to_multiple_of
        order, parts = [], []
        for name, run in runs.items():
            own = [row for row, chosen in enumerate(rows.names) if chosen == name]
            if own:
                order += own
                parts.append(run.task.encode_texts([[column[row] for row in own] for column in rows.columns], tokenizer))
        self._rows = np.array(order)
        self._run_of = np.array([self._names.index(rows.names[row]) for row in order])
        self.encoded = _joined(parts)

    def in_order(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs of `encoded` in the order of the rows."""
        ordered = np.empty_like(outputs)
        ordered[self._rows] = outputs
        return ordered

    def collate(self, encoded: EncodedSplit, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> Batch:
        """The padded texts, and `runs` (B,): which run each is for."""
        batch = pad_batch(
            encoded, indices, pad_token_id=pad_token_id, pad_to_multiple_of=self._multiple, max_length=encoded.max_length
        )  # fmt: skip
        return {**batch, "runs": torch.from_numpy(self._run_of[np.asarray(indices)])}

    def predict(self, forward: Forward, batch: Batch) -> Tensor:
        """Logits (B, C) in fp32, C of the run with most; zeros behind fewer."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "runs"}
        # A synchronisation per batch: which adapter a row takes is decided on the host.
        logits = forward([self._names[run] for run in batch["runs"].tolist()], **inputs)
        widest = max(self.widths.values())
        return torch.stack([F.pad(row.float(), (0, widest - len(row))) for row in logits])


def _joined(parts: Sequence[EncodedSplit]) -> EncodedSplit:
    lengths = np.concatenate([part.lengths for part in parts])
    return EncodedSplit(
        features={name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features},
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        labels=None,
        target_counts=np.ones(len(lengths), dtype=np.int64),
        truncated=sum(part.truncated for part in parts),
        max_length=max(part.max_length or 0 for part in parts) or None,
    )


def _folders(options: argparse.Namespace) -> dict[str, Path]:
    first = Path(options.run_folder)
    folders = {first.resolve().name: first}
    problems = []
    for given in options.adapter:
        name, equals, folder = given.partition("=")
        if not name or not equals or not folder:
            problems.append(f"--adapter {given!r} must be NAME=RUN, a name and the folder of a run")
        elif name in folders:
            problems.append(f"--adapter {given!r}: the name {name} is taken by {folders[name]}; choose another")
        else:
            folders[name] = Path(folder)
    if problems:
        raise ConfigError(problems)
    return folders


def _open(options: argparse.Namespace, folder: Path) -> _Run:
    config, precision = read_settings(options, folder, needs_data=False)
    saved = adapter_folder.read_adapter_config(folder)
    # The rows are read here, once, without labels: those of one run mean nothing to another.
    data = dataclasses.replace(config.data, data_dir=None, train_file=None, validation_file=None, test_file=None)
    task = create_task(data, config.training, model_options=saved.model_options)
    if not isinstance(task, TextClassificationTask):
        raise ConfigError(f"{folder} was trained on {task.name}, which does not take single texts; predict it by itself")
    return _Run(folder, config, precision, saved, task)


def _check_columns(runs: Mapping[str, _Run], *, by_name: bool) -> None:
    columns = {name: run.task.spec.text_columns for name, run in runs.items()}
    if len({names if by_name else len(names) for names in columns.values()}) > 1:
        shown = "; ".join(f"{name}: {' and '.join(names)}" for name, names in columns.items())
        rule = "the same text columns" if by_name else "one text each, or a pair each"
        raise ConfigError(f"the runs read different texts ({shown}), and rows of one batch need {rule}; predict them one by one")


def _check_names(rows: _Rows, runs: Mapping[str, _Run]) -> None:
    unknown = [(row, name) for row, name in enumerate(rows.names) if name not in runs]
    if unknown:
        row, name = unknown[0]
        more = f" ({len(unknown)} such rows in all)" if len(unknown) > 1 else ""
        raise DataError(f"row {row} is for the adapter {name!r}{more}; there are {', '.join(runs)} (name others with --adapter NAME=RUN)")


def _rows_of_file(options: argparse.Namespace, first: _Run) -> _Rows:
    raw = load_raw_splits(DataConfig(task_name="text", test_file=options.test_file), ("test",))["test"]
    if options.adapter_column not in raw.dataset.column_names:
        there = ", ".join(raw.dataset.column_names)
        raise DataError(f"{raw.source} has no column {options.adapter_column!r}; it has {there} (set --adapter_column)")
    columns = first.task.spec.text_columns
    # A rule whose column no file has: the rows count as unlabelled.
    dataset, problems = check_split("test", raw, columns, LabelRule(problem="regression", column=""))
    if dataset is None:
        raise DataError("\n".join(problems))
    limit = min(len(dataset), getattr(options, "max_predict_samples", None) or len(dataset))
    names = [str(name) for name in raw.dataset[options.adapter_column][:limit]]
    return _Rows([list(dataset[column][:limit]) for column in columns], names)


def _write(path: Path, predictions: Sequence[tuple[str, _Run, np.ndarray]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("index", "adapter", "prediction"))
        for index, (name, run, row) in enumerate(predictions):
            classes = run.task.spec.label.names
            writer.writerow((index, name, classes[row[0].argmax()] if classes else f"{row[0, 0]:.4f}"))
