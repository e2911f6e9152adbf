"""Fine-tune a frozen transformer with Kronecker adapters: `deepspeed launch/train.py --deepspeed ds_configs/zero2.json`.

What can be wrong with the input is found before a process group is formed: flags, JSON, output folder, data, model. At ZeRO stage 3
with a method of ours the group is formed to read the backbone's weights: flags, JSON, folder, data, method and architecture are checked
before, what the weights and the encoded examples show after it.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


from adakron.signals import SignalListener

LISTENER = SignalListener()
if __name__ == "__main__":
    LISTENER.listen()  # before the imports below, which take seconds

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch

from adakron import backbone, distributed, models, randomness, run_folder, trainable
from adakron.data.sampler import GlobalBatchSampler
from adakron.determinism import compute_deterministically
from adakron.distributed import World
from adakron.engine.engine import TrainingEngine
from adakron.errors import ConfigError
from adakron.evaluator import Evaluator
from adakron.log import get_logger
from adakron.metrics import MetricRecorder, peak_memory_mib
from adakron.placement import some_of
from adakron.run_lock import check_unlocked
from adakron.stopping import StopAgreement, StopRequest
from adakron.tasks import create_task
from adakron.tasks.classification import TextClassificationTask
from adakron.trainer import Trainer, total_steps
from adakron.weights import DTYPES
from launch import resuming
from launch.arguments import parse_train
from launch.attachment import attach, check_method, partitioning
from launch.checks import asks_for_stage, check_consistency, evaluates, resolve_deepspeed, splits_to_use
from launch.program import execute
from launch.recording import DEFAULT_PARENT, as_recorded, claim_folder, collect_results, metric_sinks, write_results
from launch.replaying import RunEvidence, asks_for_replay, run_replay
from launch.saving import Saver
from launch.summary import summary_table

logger = get_logger(__name__)


def main(arguments: Sequence[str], world: World) -> None:
    """Train, evaluate, save and report one run."""
    with contextlib.ExitStack() as held:
        _run(arguments, world, held)


def _run(arguments: Sequence[str], world: World, held: contextlib.ExitStack) -> None:
    started = time.perf_counter()
    if asks_for_replay(arguments):
        run_replay(arguments, world)
        return
    config = parse_train(arguments)
    if config.training.deterministic:
        compute_deterministically()
    if config.training.do_train is False or (config.training.do_train is None and asks_for_stage(config)):
        raise ConfigError("nothing to train: add --do_train, or use launch/evaluate.py and launch/predict.py on a saved run")
    config, resumption = resuming.find(config)
    device = distributed.select_device(world, os.environ)
    settings = resolve_deepspeed(config, world, device)
    in_place = resumption is not None and resumption.in_place
    if config.training.output_dir and in_place:
        check_unlocked(Path(config.training.output_dir))
    elif config.training.output_dir:
        run_folder.check_free(Path(config.training.output_dir), config.training.overwrite_output_dir)
    for folder_setting in (str(DEFAULT_PARENT) if not config.training.output_dir else None, config.training.logging_dir):
        if folder_setting:
            run_folder.check_writable(Path(folder_setting))
    check_method(config.adapter, settings)
    task = create_task(config.data, config.training)
    splits = splits_to_use(task, config)
    models.check_architecture(config.model, config.adapter, auto_class=task.auto_class, options=task.model_options())
    base = backbone.load_backbone(
        config.model,
        auto_class=task.auto_class,
        options=task.model_options(),
        seed=config.training.seed,
        device_type=device.type,
        compute_dtype=DTYPES[settings.precision],
        partitioned=partitioning(config, settings, world, device),
    )
    new = base.new_parameters.names
    logger.info("%d parameters of the head are new: %s", len(new), some_of(new))
    attached = attach(base, config.adapter, config.training.seed, DTYPES[settings.precision])
    model, info, router = attached.model, attached.info, attached.router
    trainable.assert_trainable(model, info)
    check_consistency(config, model)
    masks = randomness.mask_dropout(model, config.training.seed) if config.training.dropout_masks == "per_example" else None
    if config.training.gradient_checkpointing:
        models.checkpoint_activations(model, router, masks)
    report = trainable.parameter_report(model, info)
    encoded = {name: task.encode(name, base.tokenizer) for name in splits}
    for name, split in encoded.items():
        if split.truncated:
            length = config.data.max_seq_length
            logger.info("%d of %d %s examples are longer than %d tokens and were cut", split.truncated, len(split), name, length)
    recorded = as_recorded(config, base.name, task)
    sampler = GlobalBatchSampler(
        encoded["train"].lengths,
        micro_batch=config.training.per_device_train_batch_size,
        accumulation=config.training.gradient_accumulation_steps,
        world_size=world.world_size,
        rank=world.rank,
        seed=config.training.seed,
    )
    layout = {"world_size": world.world_size, "stage": settings.stage, "precision": settings.precision}
    described = resuming.describe(recorded, encoded, attached.folder.backbone, global_batch=sampler.global_batch, layout=layout)
    if resumption is not None:
        resuming.check_same(resumption.run, described, str(resumption.checkpoint or config.training.output_dir))

    distributed.form_group(world, device, timedelta(minutes=config.training.timeout_minutes))
    agreement = StopAgreement(LISTENER, config.training.max_hours)
    LISTENER.defer()
    try:
        agreement.now()
    except StopRequest as stop:
        raise StopRequest(resuming.stopped_early_message(str(stop))) from None
    resuming.check_agreement(resumption)
    if resumption is not None and resumption.finished:
        if world.rank == 0:
            print(f"{config.training.output_dir} holds a finished run: nothing is left to do", flush=True)
        return
    if resumption is not None:
        logger.info("%s", resuming.described_start(resumption, layout))
    logger.info(
        "%s on %d x %s, ZeRO-%d, %s: %s trainable of %s parameters (adapters %s in %d layers, head %s, backbone %s)",
        config.adapter.method, world.world_size, device.type, settings.stage, settings.precision, f"{report.trainable:,}",
        f"{report.total:,}", f"{report.adapter:,}", len(info.sites), f"{report.head:,}", f"{report.tuned:,}",
    )  # fmt: skip
    # A stream of its own on every rank: the framework's dropout, and what a method of PEFT's draws besides.
    torch.manual_seed(config.training.seed + world.rank)
    evaluator = Evaluator(
        task,
        batch_size=config.training.per_device_eval_batch_size,
        pad_token_id=int(base.tokenizer.pad_token_id),
        device=device,
        world_size=world.world_size,
        rank=world.rank,
        disable_progress=config.training.disable_tqdm,
        before_batch=router.evaluation_batch if router else None,
        boundary=agreement.boundary,
    )
    engine = TrainingEngine(
        model,
        trainable.trainable_groups(model, config.training.weight_decay, attached.vectors),
        settings,
        config.training,
        total_steps=total_steps(config.training, sampler.steps_per_epoch),
        device=device,
    )

    resumed_at = resumption.step if resumption is not None and in_place else None

    def claim() -> Path:
        if resumption is not None and config.training.output_dir:
            resuming.check_unchanged(resumption, Path(config.training.output_dir))
        folder = claim_folder(recorded, settings, held, resumed_at=resumed_at)
        run_folder.remove_partials(folder)
        return folder

    folder = distributed.on_rank_0(claim)
    saver = Saver(folder, attached, base.tokenizer, task, keep=config.training.save_total_limit, run=described)
    held.callback(saver.close)
    watch = distributed.peer_watch()
    if watch is not None:  # another rank's end must not cut a checkpoint off that is being written
        watch.finish_first(saver.close)
    recorder = MetricRecorder(metric_sinks(config, folder, resumed_at=resumed_at) if world.rank == 0 else ())
    trainer = Trainer(
        engine,
        task,
        sampler,
        encoded["train"],
        {name: encoded[name] for name in splits if name.startswith("validation")},
        config.training,
        evaluator=evaluator,
        recorder=recorder,
        pad_token_id=int(base.tokenizer.pad_token_id),
        save_checkpoint=saver.checkpoint,
        evidence=RunEvidence(folder, recorded, settings.precision, task),
        before_pass=randomness.announcer(router, masks),
        boundary=agreement.boundary,
    )
    if resumption is not None and resumption.saved is not None:
        trainer.resume(resumption.saved.snapshot, saved=in_place)
    try:
        with contextlib.closing(recorder):  # what a run that fails last measured is what one wants to see
            result = trainer.run()
            scores = result.scores if result.scores is not None or not evaluates(config) else trainer.evaluate()
        saver.wait()
        if world.rank == 0:
            saver.adapter(folder, result.tensors, merge=config.training.merge_experts)
            run_folder.write_json(folder / run_folder.STATE_FILE, dataclasses.asdict(result.state))
        predictions = {name: evaluator.outputs(engine, encoded[name], "predicting") for name in splits if name.startswith("test")}
    except StopRequest as stop:
        trainer.save()
        saver.wait()
        raise StopRequest(resuming.stopped_message(str(stop), trainer.step, trainer.total_steps, folder)) from None
    memory = float(distributed.all_reduce_max(torch.tensor(peak_memory_mib(device))))
    if world.rank == 0:
        for name, outputs in predictions.items():
            task.write_predictions(name, outputs, folder / f"predict_results_{name}.tsv")
        results = collect_results(config, result, scores, report, memory, time.perf_counter() - started)
        write_results(folder, results)
        pairs = isinstance(task, TextClassificationTask) and len(task.spec.text_columns) == 2
        print(summary_table(config, results, report, folder, pairs=pairs), flush=True)
    distributed.barrier()


if __name__ == "__main__":
    execute(main)
