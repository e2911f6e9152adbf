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
from adakron.errors import ConfigError
from adakron.launcher import World
from adakron.tasks.causal import CAUSAL_TASKS, cannot_predict
from adakron.tasks.classification import TextClassificationTask
from adakron.tasks.qa import QA_TASKS, QuestionTask
from launch.mixed_predictions import add_adapter_flags, is_mixed, predict_mixed
from launch.program import execute
from launch.saved_run import SavedRun, open_run, saved_run_parser, splits_named, task_of


def main(arguments: Sequence[str], world: World) -> None:
    """Print a prediction per --text, or write one per line of a split to a file."""
    parser = saved_run_parser("Predict with a saved run.")
    parser.add_argument("--split", help="Which split to predict. Default: every test split.")
    parser.add_argument("--text", action="append", help="Predict this text instead of a file; may be repeated.")
    parser.add_argument("--text_pair", action="append", help="The second text of each --text, for tasks on pairs.")
    parser.add_argument("--question", action="append", help="Answer this question instead of a file's; may be repeated.")
    parser.add_argument("--context", action="append", help="The text with the answer: one for each --question, or one for all.")
    parser.add_argument("--output_dir", help="Folder for the predictions, whose files must not exist there. Default: the run folder.")
    add_adapter_flags(parser)
    options = parser.parse(arguments)
    single = "--text" if options.text else "--question" if options.question else None
    if single and (options.output_dir or options.split or any(hasattr(options, name) for name in DATA_FILES)):
        raise ConfigError(
            f"{single} predicts the texts given and writes no file; drop --output_dir, --split and the data files, or {single}"
        )
    if (options.text and options.question) or bool(options.question) != bool(options.context):
        raise ConfigError("--question and --context belong together, and not to --text; give both, or neither")
    if options.text_pair and not options.text:
        raise ConfigError("--text_pair is the second text of a --text, and none is given; add --text, or name a file with --test_file")
    if options.output_dir:
        run_folder.check_writable(Path(options.output_dir))
    if is_mixed(options):
        if options.question:
            raise ConfigError("--adapter goes with tasks on texts; predict --question with one run")
        predict_mixed(options, world)
        return
    name = task_of(Path(options.run_folder))
    if name in CAUSAL_TASKS:
        raise ConfigError(f"{options.run_folder}: {cannot_predict(name)}")
    if options.question and name not in QA_TASKS:
        raise ConfigError(f"--question: task {name} answers no questions; give --text, or name a file with --test_file")
    run = open_run(options, world, needs_data=single is None)
    if options.text:
        _predict_texts(run, options, world)
    elif options.question:
        _answer_questions(run, options, world)
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


def _answer_questions(run: SavedRun, options: argparse.Namespace, world: World) -> None:
    assert isinstance(run.task, QuestionTask)
    encoded, questions = run.task.encode_questions(options.question, options.context, run.tokenizer)
    distributed.form_group(world, run.device)
    outputs = run.evaluator.outputs(run.model, encoded)
    if world.rank == 0:
        for question, answer in zip(options.question, run.task.answers(questions, outputs), strict=True):
            print(f"{answer.text or '(no answer)'} ({answer.probability:.3f})\t{question}")


def _predict_splits(run: SavedRun, options: argparse.Namespace, world: World) -> None:
    splits = splits_named(run.task, options.split, "test")
    folder = Path(options.output_dir or run.folder)
    taken = [str(path) for name in splits for file in run.task.prediction_files(name) if (path := folder / file).exists()]
    if taken:
        raise ConfigError(f"{', '.join(taken)} exists; choose another folder with --output_dir, or delete it")
    encoded = {name: run.task.encode(name, run.tokenizer) for name in splits}
    distributed.form_group(world, run.device)
    for name in splits:
        outputs = run.evaluator.outputs(run.model, encoded[name], "predicting")
        if world.rank == 0:
            run.task.write_predictions(name, outputs, folder)
            files = ", ".join(str(folder / file) for file in run.task.prediction_files(name))
            print(f"{len(run.task.splits()[name])} predictions in {files}")


if __name__ == "__main__":
    execute(main)
