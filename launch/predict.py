"""Predict with a saved run: `python launch/predict.py RUN_FOLDER --test_file new.csv`, or `--text "one sentence"`.

Or with several runs on one backbone, each text by the one it names: `--adapter NAME=RUN_FOLDER` (launch/mixed_predictions.py).
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import argparse
from collections.abc import Sequence

from adakron import distributed, run_folder
from adakron.config import DATA_FILES
from adakron.distributed import World
from adakron.errors import ConfigError
from adakron.tasks.causal import CausalTask, cannot_predict
from adakron.tasks.classification import TextClassificationTask
from launch.mixed_predictions import add_adapter_flags, is_mixed, predict_mixed
from launch.program import execute
from launch.saved_run import SavedRun, open_run, saved_run_parser, splits_named


def main(arguments: Sequence[str], world: World) -> None:
    """Print a prediction per --text, or write one per line of a split to a file."""
    parser = saved_run_parser("Predict with a saved run.")
    parser.add_argument("--split", help="Which split to predict. Default: every test split.")
    parser.add_argument("--text", action="append", help="Predict this text instead of a file; may be repeated.")
    parser.add_argument("--text_pair", action="append", help="The second text of each --text, for tasks on pairs.")
    parser.add_argument("--output_dir", help="Folder for predict_results_<split>.tsv, which must not exist there. Default: the run folder.")
    add_adapter_flags(parser)
    options = parser.parse(arguments)
    if options.text and (options.output_dir or options.split or any(hasattr(options, name) for name in DATA_FILES)):
        raise ConfigError("--text predicts the texts given and writes no file; drop --output_dir, --split and the data files, or --text")
    if options.text_pair and not options.text:
        raise ConfigError("--text_pair is the second text of a --text, and none is given; add --text, or name a file with --test_file")
    if options.output_dir:
        run_folder.check_writable(Path(options.output_dir))
    if is_mixed(options):
        predict_mixed(options, world)
        return
    run = open_run(options, world, needs_data=not options.text)
    if isinstance(run.task, CausalTask):
        raise ConfigError(f"{options.run_folder}: {cannot_predict(run.task.name)}")
    if options.text:
        _predict_texts(run, options, world)
    else:
        _predict_splits(run, options, world)


def _predict_texts(run: SavedRun, options: argparse.Namespace, world: World) -> None:
    if not isinstance(run.task, TextClassificationTask):
        raise ConfigError(f"--text: task {run.task.name} does not take single texts; name a file with --test_file")
    columns = [options.text] + ([options.text_pair] if options.text_pair else [])
    encoded = run.task.encode_texts(columns, run.tokenizer)
    distributed.form_group(world, run.device)
    outputs = run.evaluator.outputs(run.model, encoded)
    if world.rank == 0:
        for text, prediction in zip(options.text, run.task.describe(outputs), strict=True):
            print(f"{prediction}\t{text}")


def _predict_splits(run: SavedRun, options: argparse.Namespace, world: World) -> None:
    splits = splits_named(run.task, options.split, "test")
    folder = Path(options.output_dir or run.folder)
    targets = {name: folder / f"predict_results_{name}.tsv" for name in splits}
    taken = [str(path) for path in targets.values() if path.exists()]
    if taken:
        raise ConfigError(f"{', '.join(taken)} exists; choose another folder with --output_dir, or delete it")
    encoded = {name: run.task.encode(name, run.tokenizer) for name in splits}
    distributed.form_group(world, run.device)
    for name, path in targets.items():
        outputs = run.evaluator.outputs(run.model, encoded[name], "predicting")
        if world.rank == 0:
            run.task.write_predictions(name, outputs, path)
            print(f"{len(outputs)} predictions in {path}")


if __name__ == "__main__":
    execute(main)
