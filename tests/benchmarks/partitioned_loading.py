"""Memory per rank of a backbone that is loaded in parts for ZeRO-3, beside one that is loaded whole and partitioned afterwards.

`deepspeed --num_accelerators 2 --module tests.benchmarks.partitioned_loading whole` (or `parts`) makes a random BERT with 102
million parameters (a checkpoint of 195 MiB in bf16, 391 MiB in fp32), loads it, trains two steps with zero3_fp32.json, and prints
for each rank the memory that only it holds (RssAnon; pages of the checkpoint's file are shared and can be given back).
"""

import argparse
import ctypes
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from adakron import backbone, distributed, models, trainable
from adakron.config import AdapterConfig, ModelConfig, TrainingConfig
from adakron.engine import ds_config
from adakron.engine.engine import TrainingEngine
from adakron.engine.partitioning import partitioned_loading
from adakron.launcher import World
from launch.program import run_program
from tests.helpers import tiny
from tests.helpers.launch import ROOT
from tests.helpers.zero3_worker import counted_gathers


def held() -> float:
    """MiB of anonymous memory of this process, without what its allocator keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


class Peak:
    """The largest `held` while it is entered, looked at every 5 ms."""

    def __enter__(self) -> "Peak":
        self.mib, self._over = held(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.is_set():
            self.mib = max(self.mib, held())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def save_model(folder: Path) -> None:
    tiny.save_tiny_bert(folder)
    config = BertConfig(
        vocab_size=27, hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, intermediate_size=4096, pad_token_id=0
    )
    with torch.random.fork_rng():
        BertForSequenceClassification(config).bfloat16().save_pretrained(folder)


def load_classifier(folder: Path, partitioned: AbstractContextManager[None] | None) -> backbone.Backbone:
    """The model of a folder with a new head of two classes. partitioned: see `load_backbone`."""
    return backbone.load_backbone(
        ModelConfig(model_name_or_path=str(folder)),
        auto_class="AutoModelForSequenceClassification",
        options={"num_labels": 2},
        seed=0,
        partitioned=partitioned,
    )


def main(arguments: Sequence[str], world: World) -> None:
    """Measure one way of loading."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("whole", "parts"))
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    way = parser.parse_args(arguments).way
    device = distributed.select_device(world, os.environ)
    distributed.form_group(world, device)
    folder = Path(distributed.broadcast_object(tempfile.mkdtemp() if world.rank == 0 else None))
    if world.rank == 0:
        save_model(folder)
    distributed.barrier()
    values = ds_config.RunValues(micro_batch=2, accumulation=1, world_size=world.world_size, max_grad_norm=1.0)
    settings = ds_config.resolve(ds_config.read_json(str(ROOT / "ds_configs" / "zero3_fp32.json")), values)
    before = held()
    with Peak() as loading:
        base = load_classifier(folder, partitioned_loading(settings, device) if way == "parts" else None)
    loaded = held()
    models.adapt(base.model, AdapterConfig(), seed=0, new_parameters=base.new_parameters)
    training = TrainingConfig(max_steps=2)
    with Peak() as building:
        groups = trainable.trainable_groups(base.model, 0.0)
        engine = TrainingEngine(base.model, groups, settings, training, total_steps=2, device=device)
    ids = torch.randint(5, 25, (2, 8))
    for _ in range(2):
        with Peak() as step, counted_gathers() as gathers:
            engine.backward(engine(input_ids=ids).logits.float().square().sum(), 2 * world.world_size)
            engine.step()
    line = (
        f"rank {world.rank}: held before loading {before:.0f} MiB, peak while loading +{loading.mib - before:.0f}, loaded"
        f" +{loaded - before:.0f}, peak while the engine is built +{building.mib - before:.0f}, peak of a step +{step.mib - before:.0f};"
        f" the second step gathers {len(gathers)} times, {sum(gathers) * 4 / 2**20:.0f} MiB"
    )
    for shown in distributed.all_gather_object(line):
        if world.rank == 0:
            print(shown, flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
