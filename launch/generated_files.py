"""What a generation leaves: rows while it is under way, then a JSON-lines file and two text files, all of them or none."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adakron import adapter_folder, run_folder
from adakron.atomic import publish
from adakron.config import GenerationConfig
from adakron.errors import ConfigError
from adakron.row_store import Row, RowStore, holds_rows
from adakron.tasks.causal import Prompts
from launch.saved_run import SavedRun


def files_of(output: Path) -> tuple[Path, Path, Path]:
    """The JSON-lines file, and beside it the texts one per line and the references in groups."""
    return output, output.with_suffix(".hypotheses.txt"), output.with_suffix(".references.txt")


def folder_of(output: Path) -> Path:
    """Where rows are kept until all of them are there."""
    return output.with_name(f"{output.name}.parts")


def check_output(output: Path) -> None:
    """ConfigError where a generation can neither begin nor go on with this file. Changes nothing."""
    run_folder.check_writable(output.parent)
    if not holds_rows(folder_of(output)):  # else a generation goes on, and its files, if any, are written again
        taken = [str(file) for file in files_of(output) if file.exists()]
        if taken:
            raise ConfigError(f"{', '.join(taken)} would be overwritten; name another file with --output_file, or delete what is there")


def description(run: SavedRun, settings: GenerationConfig, prompts: Prompts, ends: Sequence[int], *, unchecked: bool, bare: bool) -> Row:
    """What decides a generation's texts, by name, in plain values. The batch size is not among it.

    unchecked: the backbone may be another one than the run's. bare: it is used without the adapter.
    """
    made_by = hashlib.sha256()
    for name in (adapter_folder.CONFIG_FILE, adapter_folder.WEIGHTS_FILE):
        made_by.update((run.folder / name).read_bytes())
    asked = hashlib.sha256(prompts.input_ids.tobytes() + prompts.offsets.tobytes())
    asked.update(json.dumps([prompts.sources, prompts.references, prompts.categories]).encode())
    return {
        "adapter": "none" if bare else made_by.hexdigest(),
        "model_name_or_path": run.config.model.model_name_or_path if unchecked or bare else "the run's",
        "prompts": asked.hexdigest(),
        "precision": run.precision,
        **settings.to_dict(),
        "eos_token_id": list(ends),
    }


def publish_rows(store: RowStore, prompts: Prompts, output: Path) -> None:
    """Put all rows in the prompts' order into the output files, and delete the store.

    The JSON-lines file comes last. A killed call is repeated by the next generation with these settings, which finds nothing to do.
    """
    rows = store.recover()
    missing = sorted({*range(len(prompts))} - {*rows})
    if missing:
        raise ConfigError(
            f"{store.folder} lacks {len(missing)} of {len(prompts)} rows, the first of them {missing[0]}: its files were changed, or the"
            " ranks do not share the folder; put --output_file where all hosts see it, and start again"
        )
    jsonl, hypotheses, references = files_of(output)
    _write(hypotheses, [one_line(rows[index]["text"]) for index in range(len(prompts))])
    if all(prompts.references):
        groups = ["\n".join(map(one_line, group)) for group in prompts.references]
        _write(references, "\n\n".join(groups).split("\n"))
    _write(jsonl, [json.dumps(_output_row(rows[index], prompts), ensure_ascii=False) for index in range(len(prompts))])
    store.remove()


def _output_row(row: Row, prompts: Prompts) -> dict[str, Any]:
    index = row["index"]
    found = {"index": index, "source": prompts.sources[index], "text": row["text"], "references": prompts.references[index]}
    return found if prompts.categories is None else found | {"category": prompts.categories[index]}


def score_command(output: Path, task_name: str) -> str:
    """What to type for the scores of finished files."""
    profile = {"e2e_nlg": "e2e", "webnlg_2017": "webnlg", "dart": "dart"}.get(task_name, "plain")
    jsonl, hypotheses, _ = files_of(output)
    return f"python launch/score.py {shlex.quote(str(hypotheses))} {shlex.quote(str(jsonl))} --profile {profile}"


def one_line(text: str) -> str:
    """The text with one space wherever it has white space."""
    return " ".join(text.split())


def _write(file: Path, lines: Sequence[str]) -> None:
    with publish(file) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
