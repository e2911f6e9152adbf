"""`launch/train.py --replay FILE`: a step that was not finite, computed again from what the run wrote down."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adakron import backbone, distributed, models, randomness
from adakron.config import DATA_FILES, RunConfig
from adakron.determinism import compute_deterministically
from adakron.dumps import StepDump, read_dump
from adakron.errors import CheckpointError, ConfigError
from adakron.launcher import World
from adakron.passes import MicroBatchLoss
from adakron.replay import replay
from adakron.tasks import create_task
from adakron.weights import DTYPES
from launch.arguments import Parser, add_launcher_flags, train_parser
from launch.attachment import Attachment, attach, mask_dropout
from launch.saved_run import check_trust


def asks_for_replay(arguments: Sequence[str]) -> bool:
    """Whether a command line of launch/train.py is that of a replay."""
    return any(argument.partition("=")[0] == "--replay" for argument in arguments)


class _ReplayParser(Parser):
    def unknown(self, token: str) -> str:
        flag = token.split("=")[0]
        if flag in train_parser()._option_string_actions:
            return (
                f"{flag} does not go with --replay: settings and examples are those in the file; drop it (only --model_name_or_path and"
                " --trust_remote_code may be given)"
            )
        return super().unknown(token)


def run_replay(arguments: Sequence[str], world: World) -> None:
    """Build the run's model with the step's parameters, compute the step, print where it stops being finite."""
    parser = _ReplayParser((), "Compute a step again that was not finite, with the settings of its run. No other flags go with --replay.")
    parser.add_argument("--replay", required=True, help="A file nonfinite-step<step>-rank<rank>.safetensors of a run.")
    parser.add_argument("--model_name_or_path", help="Where the run's backbone is now, if it moved.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Let the backbone run code of its own, as the run did.")
    add_launcher_flags(parser)
    options = parser.parse(arguments)
    if world.world_size > 1:
        raise ConfigError(f"--replay computes in one process, got {world.world_size}; start it with python launch/train.py --replay FILE")
    dump = read_dump(options.replay)
    try:
        config = RunConfig.from_dict(dump.run["config"])
        precision = DTYPES[dump.run["precision"]]
        auto_class, model_options = dump.run["auto_class"], dict(dump.run["model_options"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{options.replay} does not fit this version: {error}") from error
    check_trust(config.model, options.replay, options.trust_remote_code)
    if "id2label" in model_options:
        model_options["id2label"] = {int(label): name for label, name in model_options["id2label"].items()}  # JSON has no integer keys
    if config.training.deterministic:
        compute_deterministically()
    if options.model_name_or_path:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, model_name_or_path=options.model_name_or_path))
    device = distributed.select_device(world, os.environ)
    # The batch is in the file: what the run was trained on may be gone.
    gone: dict[str, Any] = dict.fromkeys((*DATA_FILES, "max_train_samples", "max_eval_samples", "max_predict_samples"))
    data = dataclasses.replace(config.data, **gone)
    task = create_task(data, config.training, model_options=model_options)
    base = backbone.load_backbone(
        config.model,
        auto_class=auto_class,
        options=model_options,
        seed=config.training.seed,
        device_type=device.type,
        compute_dtype=precision,
    )
    attached = attach(base, config.adapter, config.training.seed, precision)
    models.cast_parameters(attached.model, precision)
    _fill(attached, dump, options.replay)
    model = attached.model.to(device).train()
    masks = mask_dropout(model, config)
    losses = MicroBatchLoss(model, task, config.training.consistency_weight, randomness.announcer(attached.router, masks))
    found = replay(model, losses, dump, device)
    examples = "; ".join(f"micro-batch {place.micro_step}: {', '.join(map(str, place.examples))}" for place in dump.places)
    print(f"step {dump.number}, rank {dump.rank} of {dump.world_size}, {dump.run['precision']}; training examples of {examples}")
    print("\n".join(found))
    print("reproduced" if found else "not reproduced: every number is finite in this process", flush=True)


def _fill(attached: Attachment, dump: StepDump, file: str) -> None:
    trained: dict[str, nn.Parameter] = {name: p for name, p in attached.model.named_parameters() if p.requires_grad}
    wrong = [name for name in trained if name not in dump.parameters or dump.parameters[name].shape != trained[name].shape]
    wrong += [name for name in dump.parameters if name not in trained]
    if wrong:
        raise CheckpointError(
            f"{file} does not fit the model: {len(wrong)} parameters are missing, unknown or of another shape, the first {wrong[0]}; name "
            "the run's own backbone with --model_name_or_path"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(dump.parameters[name])
