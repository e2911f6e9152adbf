"""Score a saved run: `python launch/evaluate.py RUN_FOLDER`, or with other data: `... --validation_file new.csv`."""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


from collections.abc import Sequence

from adakron import distributed, run_folder
from adakron.errors import ConfigError
from adakron.evaluator import evaluation_prefix
from adakron.launcher import World
from launch.program import execute
from launch.saved_run import open_run, saved_run_parser, splits_named


def main(arguments: Sequence[str], world: World) -> None:
    """Evaluate and print; with --output_file also write the metrics as JSON."""
    parser = saved_run_parser("Score a saved run on its validation data or other labelled data.")
    parser.add_argument("--split", help="Which split to score. Default: every validation split.")
    parser.add_argument("--output_file", help="Also write the metrics as JSON here; the file must not exist.")
    options = parser.parse(arguments)
    if options.output_file and Path(options.output_file).exists():
        raise ConfigError(f"--output_file {options.output_file} exists; name another file, or delete it")
    if options.output_file:
        run_folder.check_writable(Path(options.output_file).parent)
    run = open_run(options, world)
    splits = splits_named(run.task, options.split, "validation")
    encoded = {name: run.task.encode(name, run.tokenizer) for name in splits}
    unlabelled = [name for name, split in encoded.items() if split.labels is None]
    if unlabelled:
        raise ConfigError(f"split {', '.join(unlabelled)} has no labels to score against; use launch/predict.py")
    distributed.form_group(world, run.device)
    values: dict[str, float] = {}
    for name in splits:
        scores = run.evaluator.score(run.model, name, encoded[name])
        values |= {f"{evaluation_prefix(name)}{metric}": value for metric, value in scores.items()}
    if world.rank == 0:
        for metric, value in values.items():
            print(f"{metric} = {value:.6f}")
        if options.output_file:
            file = Path(options.output_file)
            file.parent.mkdir(parents=True, exist_ok=True)
            run_folder.write_json(file, values)


if __name__ == "__main__":
    execute(main)
