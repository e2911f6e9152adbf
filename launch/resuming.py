"""`--resume_from_checkpoint`: where a run goes on from, in which folder, and whether it is still the same run."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adakron import distributed, run_folder
from adakron.checkpoint import TRAINING_STATE_FILE, SavedTraining, newest_resumable, read_training_state
from adakron.config import DATA_FILES, RunConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import BackboneFingerprint
from adakron.log import get_logger
from adakron.manifest import verify
from adakron.redaction import redact_values
from adakron.store import CheckpointStore
from adakron.tasks.base import EncodedSplit
from adakron.trainer import Trainer

logger = get_logger(__name__)

AUTO = "auto"

MAY_CHANGE: Mapping[str, frozenset[str]] = {
    "training": frozenset({
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_hours", "do_train", "do_eval", "do_predict",
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "global_batch_size",
        "gradient_checkpointing", "unpad", "kernels", "bf16", "fp16", "logging_steps", "logging_dir", "eval_strategy", "eval_steps",
        "save_strategy", "save_steps", "save_total_limit", "merge_experts", "disable_tqdm", "timeout_minutes", "on_nonfinite",
        "deterministic", "verify_batch_invariance", "auto_micro_batch",
    }),
    # Where the same data and backbone lie now does not matter: their contents are compared.
    "data": frozenset({*DATA_FILES, "max_predict_samples"}),
    "model": frozenset({
        "model_name_or_path", "tokenizer_name", "model_revision", "cache_dir", "trust_remote_code", "attn_implementation",
    }),
    "adapter": frozenset(),
}  # fmt: skip
"""Settings that a run may go on with otherwise: those that leave the training as it is, up to rounding and dropout's draws."""


@dataclass(frozen=True)
class Resumption:
    """checkpoint: goes on from here; None where the run had none yet and begins again. saved: what it holds.

    in_place: in the run's own folder. finished: that folder holds its results. run: what the run said of itself.
    """

    checkpoint: Path | None
    saved: SavedTraining | None
    in_place: bool
    finished: bool
    run: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that need not be taken again."""
        return self.saved.snapshot.step if self.saved else 0


@dataclass(frozen=True)
class _Source:
    """What resume_from_checkpoint means. home: the run folder, where there is one. named: the checkpoint itself was named."""

    home: Path | None
    checkpoint: Path | None
    saved: SavedTraining | None
    named: bool = False


def find(config: RunConfig) -> tuple[RunConfig, Resumption | None]:
    """What resume_from_checkpoint names, and the configuration with the folder that the run goes on in; None: a fresh start.

    Raises ConfigError or CheckpointError where nothing can be resumed there.
    """
    training = config.training
    given = training.resume_from_checkpoint
    if given is None:
        return config, None
    if given == AUTO:
        folder = Path(str(training.output_dir))  # TrainingConfig refuses auto without it
        if not (folder / run_folder.RUN_FILE).is_file():
            return config, None
        if _says_nothing(folder):
            return _begun_anew(config), None
        source = _newest(folder)
    else:
        source = _named(Path(given))
    output = Path(training.output_dir) if training.output_dir else source.home
    if output is None:
        raise ConfigError(f"resume_from_checkpoint {given} lies in no run folder; name the folder to go on in (--output_dir)")
    in_place = source.home is not None and output.resolve() == source.home.resolve()
    if in_place and source.named:
        _check_newest(source, output)
    run = source.saved.run if source.saved else run_folder.read_run(output)
    finished = in_place and (output / run_folder.ALL_RESULTS_FILE).is_file()
    if source.checkpoint is None and not finished:
        # Nothing is lost by beginning again in the same folder, once `check_same` knows it to be the same run's.
        return _begun_anew(config), Resumption(None, None, in_place=False, finished=False, run=run)
    config = dataclasses.replace(config, training=dataclasses.replace(training, output_dir=str(output)))
    return config, Resumption(source.checkpoint, source.saved, in_place, finished, run)


def _begun_anew(config: RunConfig) -> RunConfig:
    training = dataclasses.replace(config.training, resume_from_checkpoint=None, overwrite_output_dir=True)
    return dataclasses.replace(config, training=training)


def _says_nothing(folder: Path) -> bool:
    """Whether this is the folder of a run that was killed while it took the folder."""
    return not (folder / run_folder.RUN_FILE).stat().st_size and not CheckpointStore(folder).checkpoints()


def _check_newest(source: _Source, folder: Path) -> None:
    newest = _newer_than(source.saved.snapshot.step if source.saved else 0, folder)
    if newest is not None:
        raise ConfigError(
            f"resume_from_checkpoint {source.checkpoint}: the run has a newer checkpoint, checkpoint-{newest}, which going on from an older"
            " one would replace; name another folder to go on in (--output_dir), or the run folder to go on from the newest"
        )


def _newer_than(step: int, folder: Path) -> int | None:
    """The step of the newest checkpoint that can be resumed from, where it is a later one."""
    if not any(one.step > step for one in CheckpointStore(folder).checkpoints()):
        return None  # without reading what is there
    saved = newest_resumable(folder).saved
    return saved.snapshot.step if saved is not None and saved.snapshot.step > step else None


def _is_checkpoint(path: Path) -> bool:
    return (path / TRAINING_STATE_FILE).is_file()


def _named(path: Path) -> _Source:
    """What a path means. Raises CheckpointError where it is neither a good checkpoint nor a run that has one."""
    if _is_checkpoint(path):
        problems = verify(path)
        if problems:
            raise CheckpointError(
                f"resume_from_checkpoint {path}: {'; '.join(problems)}; name another checkpoint, or the run folder for its newest good one"
            )
        parent = path.resolve().parent
        return _Source(parent if (parent / run_folder.RUN_FILE).is_file() else None, path, read_training_state(path), named=True)
    if (path / run_folder.RUN_FILE).is_file():
        source = _newest(path)
        if source.checkpoint is not None:
            return source
        raise CheckpointError(f"resume_from_checkpoint {path}: the run has no checkpoint; start it anew with --overwrite_output_dir")
    raise CheckpointError(
        f"resume_from_checkpoint {path}: neither a run folder (no {run_folder.RUN_FILE}) nor one of its checkpoint-<step> folders (no"
        f" {TRAINING_STATE_FILE}; the final folder of a run and checkpoints of older releases have none); name one, or {AUTO}"
    )


def _newest(folder: Path) -> _Source:
    found = newest_resumable(folder)
    for path, reason in found.rejected.items():
        logger.warning("%s is passed over: %s", path.name, reason)
    if found.checkpoint is None and found.rejected:
        raise CheckpointError(
            f"{folder}: none of its {len(found.rejected)} checkpoints can be read; the newest: {next(iter(found.rejected.values()))}; start"
            " anew with --overwrite_output_dir, or in another --output_dir"
        )
    return _Source(folder, found.checkpoint, found.saved)


def describe(
    config: RunConfig, encoded: Mapping[str, EncodedSplit], backbone: BackboneFingerprint, *, global_batch: int, layout: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run says of itself in its checkpoints. layout: ranks, stage, precision, for the reader only."""
    data = {name: {"examples": len(split), "sha256": split.digest()} for name, split in encoded.items() if not name.startswith("test")}
    content = {"config": config.to_dict(), "data": data, "backbone": backbone.to_dict(), "global_batch": global_batch, "layout": layout}
    described: dict[str, Any] = json.loads(json.dumps(redact_values(content)))  # as it will be read back
    return described


def check_same(resumption: Resumption, now: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError naming everything that makes a run another one than the saved. now: as `describe` has it.

    source: where the saved is from. A run without a checkpoint is known by its run.json, which holds the settings alone.
    """
    saved = resumption.run
    problems = []
    for group, may_change in MAY_CHANGE.items():
        before = saved["config"].get(group, {})
        for name, value in now["config"][group].items():
            # A setting that an older release did not have was at its default.
            if name not in may_change and name in before and before[name] != value:
                problems.append(f"{name} was {before[name]!r}, it is {value!r} now; give --{name} as it was")
    if "global_batch" in saved and saved["global_batch"] != now["global_batch"]:
        problems.append(
            f"a step took {saved['global_batch']} examples, it would take {now['global_batch']} now; give --global_batch_size"
            f" {saved['global_batch']}{_without_accumulation(now)}"
        )
    for split, before in saved.get("data", {}).items():
        here = now["data"].get(split)
        if here is None or here == before:
            continue
        what = f"{before['examples']} examples, {here['examples']} now" if before["examples"] != here["examples"] else "other examples"
        problems.append(f"the {split} data differ ({what}); give the data that it began with")
    if "backbone" in saved:
        problems += _backbone_problems(saved["backbone"], now["backbone"])
    anew = ", or begin anew: --overwrite_output_dir in place of --resume_from_checkpoint" if resumption.checkpoint is None else ""
    if problems:
        raise ConfigError([f"{source} cannot be gone on with: {problem}{anew}" for problem in problems])


def _without_accumulation(now: Mapping[str, Any]) -> str:
    given = now["config"]["training"].get("gradient_accumulation_steps", 1) != 1
    return " in place of --gradient_accumulation_steps" if given else ""


def _backbone_problems(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    differing = [name for name, value in now.items() if before.get(name) != value]
    return [f"the backbone differs in its {', '.join(differing).replace('_', ' ')}; give the one that it began with"] if differing else []


def stopped_message(asked: str, trainer: Trainer, folder: Path) -> str:
    """What a run that was asked to stop says last."""
    if not trainer.step:
        return (
            f"stopped by {asked} before the first step; nothing was saved, but {folder} is this run's now; to begin there after all, add"
            f" --output_dir {folder} --resume_from_checkpoint {AUTO}"
        )
    place = "in the evaluation at" if trainer.owes_evaluation else "at"
    return f"stopped by {asked} {place} step {trainer.step} of {trainer.total_steps}; to go on, add --resume_from_checkpoint {folder}"


def stopped_early_message(asked: str) -> str:
    """What a run says that was asked to stop before it began."""
    return f"stopped by {asked} before training began; nothing was written (if max_hours stopped it, give more)"


def described_start(resumption: Resumption, layout: Mapping[str, Any]) -> str:
    """One line: from which checkpoint the run goes on, and what of its layout is another one now."""
    if resumption.checkpoint is None:
        return "the run has no checkpoint yet: it begins anew"
    before = resumption.run.get("layout", {})
    changed = [
        f"{name.replace('_', ' ')} {before[name]} -> {now}" for name, now in layout.items() if name in before and before[name] != now
    ]
    return f"goes on from {resumption.checkpoint} (step {resumption.step})" + "".join(f"; {change}" for change in changed)


def check_agreement(resumption: Resumption | None) -> None:
    """Raise CheckpointError on all ranks unless all of them go on from the same step, and found the run finished or not alike."""
    found = distributed.all_gather_object((resumption.step, resumption.finished) if resumption else None)
    if len(set(found)) > 1:
        steps = [f"step {one[0]}{', finished' if one[1] else ''}" if one else "nothing" for one in found]
        raise CheckpointError(
            f"the processes found different things to go on from (by rank: {'; '.join(steps)}): the run folder must be on storage that all"
            " hosts share, and no other run may write there; start again"
        )


def check_unchanged(resumption: Resumption, folder: Path) -> None:
    """Raise CheckpointError where another run wrote into the folder after `find` had read it. Rank 0, holding the folder's lock."""
    if not resumption.in_place and resumption.checkpoint is not None:
        return  # it goes on elsewhere
    newest = _newer_than(resumption.step, folder)
    if newest is not None:
        raise CheckpointError(
            f"{folder} went on to step {newest} after this run had read step {resumption.step}: another run wrote there;"
            " start again to go on from there"
        )
    if not resumption.finished and (folder / run_folder.ALL_RESULTS_FILE).is_file():
        raise CheckpointError(f"{folder} was finished by another run after this one had looked; nothing is left to do there")
