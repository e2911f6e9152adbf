"""Compares, on every rank, a backbone that is loaded in parts for ZeRO-3 with one that is loaded whole.

Started as `deepspeed --module tests.helpers.zero3_worker FOLDER`; every rank writes FOLDER/result-<rank>.json. FOLDER holds
`model`, whose checkpoint has a head of another size than the one asked for.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed.comm.comm
import torch
import torch.nn.functional as F

from adakron import backbone, distributed, models, trainable, weights
from adakron.backbone import Backbone
from adakron.config import AdapterConfig, DataConfig, ModelConfig, TrainingConfig
from adakron.data.sampler import evaluation_batches
from adakron.engine import ds_config
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.engine.engine import TrainingEngine
from adakron.engine.partitioning import partitioned_loading
from adakron.evaluator import Evaluator
from adakron.fingerprint import take_fingerprint
from adakron.launcher import World
from adakron.tasks.glue import TextTask
from launch.program import run_program
from tests.helpers import tiny
from tests.helpers.launch import ROOT

CLASSES, STEPS, MICRO_BATCH = 5, 4, 2
SPLIT_SIZES = (1, 2, 3, 7)
"""Of evaluation: fewer examples than ranks, and odd numbers. The batch size is 2."""


def write_inputs(folder: Path) -> None:
    """A checkpoint with a head of two classes."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    backbone_folder = tiny.save_tiny_bert(folder / "without head")
    BertForSequenceClassification.from_pretrained(backbone_folder, num_labels=2).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(backbone_folder).save_pretrained(folder / "model")
    rows = [{"text": text, "label": number % CLASSES} for number, text in enumerate(tiny.sentences(max(SPLIT_SIZES), seed=2))]
    tiny.write_jsonl(folder / "data" / "train.jsonl", rows)


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    """Elements of every all-gather of the process meanwhile, in order. Only one of DeepSpeed's collectives gathers weights."""
    backend: Any = deepspeed.comm.comm.cdb
    original = backend.all_gather_into_tensor
    found: list[int] = []

    def counting(output_tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        found.append(output_tensor.numel())
        return original(output_tensor, *arguments, **options)

    backend.all_gather_into_tensor = counting
    try:
        yield found
    finally:
        del backend.all_gather_into_tensor


def load(folder: Path, settings: DeepSpeedSettings, device: torch.device, *, apart: bool) -> Backbone:
    return backbone.load_backbone(
        ModelConfig(model_name_or_path=str(folder / "model")),
        auto_class="AutoModelForSequenceClassification",
        options={"num_labels": CLASSES},
        seed=3,
        partitioned=partitioned_loading(settings, device) if apart else None,
    )


def same(parameter: torch.Tensor, other: torch.Tensor) -> bool:
    with weights.gathered([other]):
        return torch.equal(parameter, other)


def compare_loading(whole: Backbone, apart: Backbone) -> dict[str, Any]:
    parameters = dict(whole.model.named_parameters())
    other = dict(apart.model.named_parameters())
    assert parameters.keys() == other.keys()
    buffers = dict(whole.model.named_buffers())
    return {
        "differing": [name for name, parameter in parameters.items() if not same(parameter, other[name])],
        "differing_buffers": [name for name, buffer in apart.model.named_buffers() if not torch.equal(buffer, buffers[name])],
        "shapes_agree": all(weights.shape(other[name]) == tuple(parameter.shape) for name, parameter in parameters.items()),
        "held_here": sum(parameter.ds_tensor.numel() for parameter in other.values()),
        "left_whole": [name for name, parameter in other.items() if parameter.numel()],
        "elements": sum(parameter.numel() for parameter in parameters.values()),
        "new": [list(base.new_parameters.missing) for base in (whole, apart)],
        "same_fingerprint": take_fingerprint(whole.model, whole.tokenizer) == take_fingerprint(apart.model, apart.tokenizer),
    }


def train(base: Backbone, settings: DeepSpeedSettings, folder: Path, world: World, device: torch.device) -> dict[str, Any]:
    info = models.adapt(base.model, AdapterConfig(bottleneck_dim=8, init_std=0.2), seed=1, new_parameters=base.new_parameters)
    training = TrainingConfig(learning_rate=1e-2, warmup_ratio=0.0, max_steps=STEPS)
    groups = trainable.trainable_groups(base.model, 0.1)
    engine = TrainingEngine(base.model, groups, settings, training, total_steps=STEPS, device=device)
    start = engine.trainable_tensors()
    engine.train()
    generator = torch.Generator().manual_seed(world.rank)
    losses, gathers = [], []
    for _ in range(STEPS):
        ids = torch.randint(5, 25, (MICRO_BATCH, 6), generator=generator)
        labels = torch.randint(CLASSES, (MICRO_BATCH,), generator=generator)
        with counted_gathers() as counted:
            logits = engine(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            engine.backward(loss, MICRO_BATCH * world.world_size)
            engine.step()
        losses.append(float(loss.detach()))
        gathers.append([len(counted), sum(counted)])
    frozen = sum(weights.size(parameter) for parameter in base.model.parameters() if not parameter.requires_grad)
    return {
        "start": {name: tensor.tolist() for name, tensor in start.items()},
        "tensors": {name: tensor.tolist() for name, tensor in engine.trainable_tensors().items()},
        "losses": losses,
        "gathers": gathers,
        "frozen": frozen,
        "report": vars(trainable.parameter_report(base.model, info)),
        "outputs": evaluate(engine, base, folder, world, device),
    }


def evaluate(engine: TrainingEngine, base: Backbone, folder: Path, world: World, device: torch.device) -> dict[str, Any]:
    """Outputs for splits that do not divide among the ranks."""
    data = DataConfig(task_name="text", data_dir=str(folder / "data"), text_column="text", label_column="label", problem="classification")
    outputs = {}
    engine.eval()
    for size in SPLIT_SIZES:
        task = TextTask(dataclasses.replace(data, max_train_samples=size), TrainingConfig())
        encoded = task.encode("train", base.tokenizer)
        evaluator = Evaluator(
            task, batch_size=2, pad_token_id=0, device=device, world_size=world.world_size, rank=world.rank, disable_progress=True
        )
        mine = sum(len(rows) > 0 for rows in evaluation_batches(encoded.lengths, 2, world.world_size, world.rank))
        outputs[str(size)] = {"values": evaluator.outputs(engine, encoded).tolist(), "own_batches": mine}
    return outputs


def main(arguments: Sequence[str], world: World) -> None:
    """Both precisions, one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    folder = parser.parse_args(arguments).folder
    device = distributed.select_device(world, os.environ)
    distributed.form_group(world, device)
    result = {}
    for precision, name in (("fp32", "zero3_fp32"), ("bf16", "zero3")):
        values = ds_config.RunValues(micro_batch=MICRO_BATCH, accumulation=1, world_size=world.world_size, max_grad_norm=1.0)
        settings = ds_config.resolve(ds_config.read_json(str(ROOT / "ds_configs" / f"{name}.json")), values)
        whole, apart = (load(folder, settings, device, apart=way) for way in (False, True))
        result[precision] = {
            "loading": compare_loading(whole, apart),
            "whole": train(whole, settings, folder, world, device),
            "apart": train(apart, settings, folder, world, device),
        }
    (folder / f"result-{world.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
