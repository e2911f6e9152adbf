"""Predict with a saved run: `python launch/predict.py RUN_FOLDER --test_file new.csv`, or `--text "one sentence"`."""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import tempfile
from collections.abc import Sequence

from adakron import distributed
from adakron.distributed import World
from adakron.errors import ConfigError
from launch.program import run_program
from launch.saved_run import SavedRun, open_run, saved_run_parser, splits_named


def main(arguments: Sequence[str], world: World) -> None:
    """Write one prediction per line to a file, or print them."""
    parser = saved_run_parser("Predict with a saved run.")
    parser.add_argument("--split", help="Which split to predict. Default: every test split.")
    parser.add_argument("--text", action="append", help="Predict this text instead of a file; may be repeated.")
    parser.add_argument("--text_pair", action="append", help="The second text that belongs to each --text, for pair tasks.")
    parser.add_argument("--output_file", help="Where the predictions go; the file must not exist. Default: standard output.")
    options = parser.parse(arguments)
    target = Path(options.output_file) if options.output_file else None
    if target is not None and target.exists():
        raise ConfigError(f"--output_file {target} exists; name another file, or delete it")
    run = open_run(options, world)
