"""What a run leaves in its output folder, and how that folder is claimed: never over another run's files by accident."""

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adakron.atomic import publish, published_name
from adakron.errors import CheckpointError, ConfigError
from adakron.run_lock import LOCK_FILE, RunLock, check_unlocked
from adakron.store import CheckpointStore, is_stores
from adakron.untrusted import UnreadableError, read_json

RUN_FILE = "run.json"
DEEPSPEED_FILE = "deepspeed.json"
STATE_FILE = "trainer_state.json"
BACKBONE_FILE = "backbone.json"
METRICS_FILE = "metrics.jsonl"
ALL_RESULTS_FILE = "all_results.json"
STOPPED_FILE = "stopped.json"
"""There while a run that was asked to stop, and saved, waits to go on. Exit codes of launchers do not tell that reliably."""

HEARTBEAT_FILE = "heartbeat.json"
TENSORBOARD_FOLDER = "tensorboard"
LOGS_FOLDER = "logs"
"""What each rank said: rank0.log, rank1.log, ..."""

TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
}  # fmt: skip
"""What transformers saves a tokenizer as; each kind of tokenizer writes some of them."""

_WRITTEN = TOKENIZER_FILES | {
    RUN_FILE, DEEPSPEED_FILE, STATE_FILE, METRICS_FILE, BACKBONE_FILE, "train_results.json", "eval_results.json",
    ALL_RESULTS_FILE, STOPPED_FILE, HEARTBEAT_FILE, "adapter_config.json", "adapter_model.safetensors",
}  # fmt: skip
_WRITTEN_NAMES = re.compile(
    r"predict_results_\w+\.tsv|generated_\w+\.(jsonl|hypotheses\.txt|references\.txt)"
    r"|(train|validation|test)_(predictions|nbest_predictions|null_odds)\.json"
    r"|nonfinite-step\d+-rank\d+(-\d+)?\.safetensors"
)
_VERSIONED = (
    "adakron",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "evaluate",
    "numpy",
    "scikit-learn",
    "scipy",
    "tokenizers",
)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ConfigError unless a run may write into the folder. Changes nothing."""
    if len(folder.name.encode()) > 255 or (folder.is_symlink() and not folder.exists()):
        raise ConfigError(
            f"output_dir {folder} cannot be made: its name is too long, or a dangling link; name another folder (--output_dir)"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; name a folder (--output_dir)")
    check_writable(folder)
    if not folder.is_dir():
        return
    check_unlocked(folder)
    # A free lock is no content: it stays behind wherever a run started.
    content = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK_FILE)
    if content and not overwrite:
        newest = CheckpointStore(folder).latest if RUN_FILE in content else None
        if newest is not None:
            raise ConfigError(
                f"output_dir {folder} already holds a run, with {newest.name}; go on from there with --resume_from_checkpoint auto, name"
                " another folder (--output_dir), or replace it with --overwrite_output_dir"
            )
        what = "already holds a run" if RUN_FILE in content else f"is not empty (holds {', '.join(content[:3])}, ...)"
        raise ConfigError(f"output_dir {folder} {what}; name another folder (--output_dir), or replace it with --overwrite_output_dir")
    if content and RUN_FILE not in content:
        raise ConfigError(
            f"output_dir {folder} is not empty and holds no run of this program ({', '.join(content[:3])}, ...): --overwrite_output_dir "
            "replaces runs only; name another folder (--output_dir)"
        )


def check_writable(folder: Path) -> None:
    """Raise ConfigError unless the folder, or what of its path exists, lets us write. Changes nothing."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ConfigError(f"{folder} cannot be made: {there} is a file; name another folder (--output_dir, --logging_dir)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be written: no permission in {there}; name another folder (--output_dir, --logging_dir)")


def free_folder(name: str) -> Path:
    """A folder that can be made or is empty; ConfigError else."""
    folder = Path(name)
    check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir {folder} is not empty, and nothing is overwritten; name another folder (--output_dir)")
    return folder


def claim(folder: Path, overwrite: bool, unchanged: Callable[[], None] | None = None) -> RunLock:
    """Make the folder ours, empty of a former run where overwrite allows it. Only rank 0 calls it.

    unchanged: called while nobody else can write there and nothing is deleted yet; may raise.
    Returns the lock to hold while the run writes. Raises ConfigError where another run got there since `check_free`.
    """
    check_free(folder, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_ready(folder, error) from error
    with contextlib.ExitStack() as held:
        lock = held.enter_context(RunLock(folder))
        if unchanged is not None:
            unchanged()
        try:
            if overwrite and (folder / RUN_FILE).exists():
                _remove_run(folder)
            (folder / RUN_FILE).open("x").close()
        except FileExistsError:
            raise ConfigError(f"output_dir {folder} was taken by another run this moment; name another folder (--output_dir)") from None
        except OSError as error:
            raise _not_ready(folder, error) from error
        held.pop_all()
    return lock


def _not_ready(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output_dir {folder} cannot be made ready: {error.strerror}; name another folder (--output_dir)")


def remove_partials(folder: Path) -> None:
    """Delete what killed runs left half written (see `atomic.publish`); the caller holds the run's lock."""
    for entry in folder.iterdir():
        name = published_name(entry.name)
        if name is not None and (name in _WRITTEN or _WRITTEN_NAMES.fullmatch(name)):
            entry.unlink()


def _remove_run(folder: Path) -> None:
    # Only what a run writes: whatever else lies there is somebody's. The file that makes it a run goes last: a killed removal is repeated.
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == RUN_FILE):
        if entry.is_dir() and not entry.is_symlink():
            if entry.name == TENSORBOARD_FOLDER or is_stores(entry):
                shutil.rmtree(entry)
            elif entry.name == LOGS_FOLDER:
                _remove_logs(entry)
        elif entry.name in _WRITTEN or _WRITTEN_NAMES.fullmatch(entry.name) or is_stores(entry):
            entry.unlink()


def rank_log(folder: Path, rank: int) -> Path:
    """Where a rank keeps what it said."""
    return folder / LOGS_FOLDER / f"rank{rank}.log"


def _remove_logs(logs: Path) -> None:
    for log in logs.iterdir():
        if re.fullmatch(r"rank\d+\.log", log.name) and not log.is_dir():
            log.unlink()
    with contextlib.suppress(OSError):  # somebody else's files are in it, too
        logs.rmdir()


def claim_new(stem: Path) -> tuple[Path, RunLock]:
    """Claim a folder of that name, or with -2, -3, ... after it where other runs started in the same second. Rank 0 only."""
    for attempt in itertools.count(1):
        folder = stem if attempt == 1 else stem.with_name(f"{stem.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder, claim(folder, overwrite=False)
    raise AssertionError("unreachable: some name is free")


def free_name(file: Path) -> Path:
    """That name, or with -2, -3, ... before its ending where there is such a file."""
    return next(
        name for attempt in itertools.count(1) if not (name := file if attempt == 1 else file.with_stem(f"{file.stem}-{attempt}")).exists()
    )


def write_json(file: Path, content: Any, *, durable: bool = True) -> None:
    """Write a JSON file so that nobody ever sees half of it. durable: see `publish`. The folder must exist."""
    with publish(file, durable=durable) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=True) + "\n", encoding="utf-8")


def read_run(folder: str | Path) -> dict[str, Any]:
    """The resolved configuration that a run wrote. Raises CheckpointError where there is none."""
    file = Path(folder) / RUN_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no {RUN_FILE}: it is not the output folder of a finished or started run; name one")
    try:
        content = read_json(file)
    except (OSError, UnreadableError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); the run folder is damaged") from error
    if not isinstance(content, dict) or "config" not in content:
        raise CheckpointError(f"{file} holds no configuration; the run folder is damaged or of another program")
    return content


def environment() -> dict[str, Any]:
    """Versions that produced a run: Python, packages, the git revision of the working directory's checkout where there is one."""
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions, "git": git_revision()}


def git_revision() -> str | None:
    """Commit of the checkout that this code runs from, with "-dirty" where files differ; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
