"""Generate with a saved run: `deepspeed launch/generate.py RUN_FOLDER --split test`, or `--text "name : The Eagle"`, or `--source_file`.

A generation that was killed or stopped goes on with the same command. See docs/decoding.md.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


from adakron.signals import SignalListener

LISTENER = SignalListener("generation", "after this batch; finished rows are kept")
if __name__ == "__main__":
    LISTENER.listen()  # before the imports below, which take seconds

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from adakron import distributed
from adakron.config import DATA_FILES, GenerationConfig
from adakron.decoding import BeamDecoder, decode_prompts, rank_batches
from adakron.errors import ConfigError
from adakron.launcher import World
from adakron.log import get_logger
from adakron.progress import GenerationProgress
from adakron.row_store import RowStore
from adakron.run_lock import RunLock
from adakron.stopping import StopAgreement, StopRequest
from adakron.tasks.causal import PAIR_TASKS, PairTask, Prompts, prompts_of
from adakron.untrusted import UnreadableError, read_text
from launch import generated_files
from launch.arguments import Parser
from launch.program import execute
from launch.saved_run import SavedRun, open_run, saved_run_parser, splits_named, task_of

logger = get_logger(__name__)

BATCH_SIZE = 16
"""Prompts per batch where none is given: a run's batch for evaluation holds no beams."""


def main(arguments: Sequence[str], world: World) -> None:
    """Print a text per --text, or write the texts of a split or a file of sources."""
    options = parser().parse(arguments)
    settings = GenerationConfig(**{name: getattr(options, name) for name in GenerationConfig.__dataclass_fields__})
    _check(options)
    options.per_device_eval_batch_size = options.per_device_eval_batch_size or BATCH_SIZE
    sources = _sources(options)
    name = task_of(Path(options.run_folder))
    if name not in PAIR_TASKS:
        raise ConfigError(f"{options.run_folder} is a run of task {name}, which generates no texts; {_WHO_DOES}")
    given = getattr(options, "task_name", name)
    if given not in PAIR_TASKS:
        raise ConfigError(f"task_name is {given}, which has no sources to generate from; {_WHO_DOES} (set --task_name, or drop it)")
    output = None if options.text else Path(options.output_file or Path(options.run_folder) / f"generated_{options.split}.jsonl")
    if output is not None:
        generated_files.check_output(output)
    run = open_run(options, world, needs_data=sources is None, deepspeed=options.deepspeed, with_adapter=not options.without_adapter)
    prompts = prompts_of(sources, run.tokenizer) if sources is not None else _prompts_of_split(run, options.split)
    decoder = BeamDecoder(run.model, run.tokenizer, settings, device=run.device, in_step=run.partitioned and world.world_size > 1)
    cut = int((np.diff(prompts.offsets) > decoder.longest_prompt).sum())
    if cut:
        logger.warning("%d of %d prompts are longer than %d tokens and lose their beginning", cut, len(prompts), decoder.longest_prompt)
    distributed.form_group(world, run.device)
    if output is None:
        _print_texts(decoder, prompts, options.per_device_eval_batch_size, world)
        return
    described = generated_files.description(
        run, settings, prompts, decoder.ends, unchecked=options.allow_other_backbone, bare=options.without_adapter
    )
    store = RowStore(generated_files.folder_of(output), described, len(prompts))
    _write_texts(decoder, prompts, options.per_device_eval_batch_size, world, store, output, options.max_hours)
    if world.rank == 0 and all(prompts.references):
        print(f"score them with: {generated_files.score_command(output, run.task.name)}")


_WHO_DOES = f"those of {', '.join(PAIR_TASKS)} do"


def parser() -> Parser:
    """The flags of launch/generate.py."""
    flags = saved_run_parser("Generate texts with a saved run.", GenerationConfig)
    flags.add_argument("--split", help="Whose sources to generate from. Default: test.")
    flags.add_argument("--text", action="append", help="Generate from this source, as the model reads sources, and print; may be repeated.")
    flags.add_argument("--source_file", help="Generate from each line of this text file.")
    flags.add_argument(
        "--output_file", help="Where to write, beside it the plain text files. Default: generated_<split>.jsonl in the run folder."
    )
    flags.add_argument("--without_adapter", action="store_true", help="Generate with the backbone alone, as it was before the run.")
    flags.add_argument(
        "--deepspeed", help="DeepSpeed JSON; at ZeRO-3 each rank holds a part of the weights. Default: each rank holds all of them."
    )
    flags.add_argument("--max_hours", type=float, help="Stop after so many hours of wall-clock time, to go on later.")
    for action in flags._actions:
        if action.dest == "per_device_eval_batch_size":
            action.help = f"Prompts per batch and rank, each with num_beams hypotheses. Default: {BATCH_SIZE}."
    return flags


def _check(options: argparse.Namespace) -> None:
    """Refuse flags that would do nothing, and fill in the default split."""
    own_sources = [flag for flag in ("text", "source_file") if getattr(options, flag)]
    idle = [name for name in ("split", *DATA_FILES) if getattr(options, name, None)]
    idle += [name for name in ("output_file", "max_hours") if options.text and getattr(options, name)]
    problems = []
    if len(own_sources) == 2:
        problems.append("--text and --source_file are both given; drop one")
    elif own_sources and idle:
        problems.append(f"--{own_sources[0]} gives the sources; drop --{', --'.join(idle)}, or --{own_sources[0]}")
    if options.source_file and not options.output_file:
        problems.append("--source_file needs a file to write; name it with --output_file")
    if options.output_file and not options.output_file.endswith(".jsonl"):
        # Of other endings two could share their text files, and launch/score.py knows JSON lines by this one.
        problems.append(f"output_file is {options.output_file}; it must end in .jsonl (set --output_file)")
    if options.max_hours is not None and not 0.0 < options.max_hours < math.inf:
        problems.append(f"max_hours is {options.max_hours}; it must be a positive number of hours (set --max_hours)")
    if options.per_device_eval_batch_size is not None and options.per_device_eval_batch_size < 1:
        problems.append(f"per_device_eval_batch_size is {options.per_device_eval_batch_size}; it must be at least 1")
    if options.without_adapter and options.inference_level is not None:
        problems.append("inference_level chooses among the adapter's experts, and --without_adapter leaves it out; drop one")
    if problems:
        raise ConfigError(problems)
    options.split = options.split or "test"


def _sources(options: argparse.Namespace) -> list[str] | None:
    """The sources that the flags give, without white space around them; None: those of a split."""
    if options.text:
        given, place = options.text, "--text number"
    elif options.source_file:
        try:
            # Only line ends part lines: `splitlines` would part them at form feeds and the separators of Unicode, too.
            given, place = read_text(options.source_file).removesuffix("\n").split("\n"), f"--source_file {options.source_file}: line"
        except (OSError, UnreadableError) as error:
            raise ConfigError(
                f"--source_file {options.source_file}: cannot be read ({error}); name a text file with a source per line"
            ) from error
    else:
        return None
    sources = [text.strip() for text in given]
    if not all(sources):
        raise ConfigError(f"{place} {sources.index('') + 1} holds no source; give one, or leave it out")
    return sources


def _prompts_of_split(run: SavedRun, split: str) -> Prompts:
    assert isinstance(run.task, PairTask)
    (name,) = splits_named(run.task, split, split)
    return run.task.prompts(name, run.tokenizer)


def _print_texts(decoder: BeamDecoder, prompts: Prompts, batch_size: int, world: World) -> None:
    mine = [row for rows in decode_prompts(decoder, prompts, np.arange(len(prompts)), batch_size=batch_size, world=world) for row in rows]
    found = {row.index: row.text for rows in distributed.all_gather_object(mine) for row in rows}
    if world.rank == 0:
        for index in range(len(prompts)):
            print(generated_files.one_line(found[index]))


def _write_texts(
    decoder: BeamDecoder, prompts: Prompts, batch_size: int, world: World, store: RowStore, output: Path, max_hours: float | None
) -> None:
    agreement = StopAgreement(LISTENER, max_hours)
    LISTENER.defer()
    with contextlib.ExitStack() as held:
        done = distributed.on_rank_0(lambda: _claim(store, output, held))
        pending = np.array(sorted({*range(len(prompts))} - {*done}), dtype=np.int64)
        if done:
            logger.info("%s holds %d of %d rows: %d are left", store.folder, len(done), len(prompts), len(pending))
        progress = GenerationProgress(sum(map(len, rank_batches(prompts, pending, batch_size, world))), None)
        try:
            with store.writer(world.rank) as writer:
                for rows in decode_prompts(
                    decoder, prompts, pending, batch_size=batch_size, world=world, boundary=agreement.boundary, progress=progress
                ):
                    writer.append([dataclasses.asdict(row) for row in rows])
        except StopRequest as stop:
            distributed.barrier()
            kept = distributed.on_rank_0(lambda: len(store.recover()))
            raise StopRequest(f"stopped by {stop}: {kept} of {len(prompts)} rows are kept; the same command goes on") from None
        finally:
            progress.close()
        seconds, tokens = progress.seconds, sum(distributed.all_gather_object(progress.tokens))
        distributed.on_rank_0(lambda: generated_files.publish_rows(store, prompts, output))
        if world.rank == 0:
            print(f"{len(prompts)} texts in {output} ({tokens:,} tokens in {seconds:,.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s)")


def _claim(store: RowStore, output: Path, held: contextlib.ExitStack) -> list[int]:
    """The indices of finished rows in a folder that nobody else writes until `held` ends. Rank 0 only."""
    store.folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(RunLock(store.folder, "name another file with --output_file"))
    try:
        generated_files.check_output(output)  # another generation may have finished while this one loaded its model
    except ConfigError:
        store.remove()
        raise
    return list(store.recover())


if __name__ == "__main__":
    execute(main)
