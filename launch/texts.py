"""Write the target texts of generation tasks' training splits as plain text, to pretrain a decoder on (`--task_name lm`).

    python launch/texts.py e2e_nlg=DATA_DIR webnlg_2017=DATA_DIR --output_dir TEXTS

One file TEXTS/<task>.txt each, one text a line, in a seeded order; every line begins with a space, as a target does after its source. No
source is written: which text belongs to which is left for the adapters to learn.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import random
from collections.abc import Sequence

from adakron import run_folder
from adakron.atomic import publish
from adakron.config import DataConfig, TrainingConfig
from adakron.errors import ConfigError, DataError
from adakron.launcher import World
from adakron.tasks.causal import PAIR_TASKS
from launch.arguments import Parser
from launch.program import execute, refuse_launcher


def main(arguments: Sequence[str], world: World) -> None:
    """Write the files and say how many texts each holds."""
    parser = Parser((), "Write the target texts of generation tasks as plain text.")
    parser.add_argument("data", nargs="+", metavar="TASK=DATA_DIR", help=f"A task of {', '.join(PAIR_TASKS)}, and its data folder.")
    parser.add_argument("--output_dir", required=True, help="Folder for <task>.txt, which must not exist there.")
    parser.add_argument("--seed", type=int, default=0, help="Of the order of the texts.")
    options = parser.parse(arguments)
    refuse_launcher(world)
    folder = Path(options.output_dir)
    run_folder.check_writable(folder)
    texts = {}
    for given in options.data:
        name, _, data_dir = given.partition("=")
        file = folder / f"{name}.txt"
        if name not in PAIR_TASKS or not data_dir:
            raise ConfigError(f"{given!r} is no TASK=DATA_DIR; tasks are {', '.join(PAIR_TASKS)}")
        if file.exists() or file in texts:
            raise ConfigError(f"{file} is there already, or would be written twice; name another --output_dir, or drop {given}")
        task = PAIR_TASKS[name](DataConfig(task_name=name, data_dir=data_dir), TrainingConfig())
        try:
            texts[file] = [" ".join(text.split()) for text in task.split("train")["target"]]
        except DataError as error:
            raise DataError(f"{given}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    for file, lines in texts.items():
        random.Random(options.seed).shuffle(lines)
        with publish(file) as partial:
            partial.write_text("".join(f" {line}\n" for line in lines), encoding="utf-8")
        print(f"{len(lines):,} texts in {file}")


if __name__ == "__main__":
    execute(main)
