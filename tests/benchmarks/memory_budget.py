"""What each rank holds where a backbone trains that is larger than that, on hosts without a GPU.

`MALLOC_ARENA_MAX=1 deepspeed --num_accelerators 2 --module tests.benchmarks.memory_budget WAY` makes a random BERT of 16 layers of
1024 (202 million parameters, 769 MiB in fp32; the checkpoint in bf16, in files of 64 MB), loads and adapts it, trains four steps
in fp32 and prints for each rank the peak of the memory that only it holds (RssAnon), beyond that of the libraries.
WAY: whole (ZeRO-2), parts (ZeRO-3, each rank keeps its share), nvme (ZeRO-3, shares in a folder, --nvme_path; needs libaio).
--limit_mib imposes what each rank may hold from then on, by a memory cgroup of its own (root, cgroup v1 or v2): the kernel kills one that
needs more.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from adakron import distributed, models, trainable
from adakron.config import AdapterConfig, TrainingConfig
from adakron.engine import ds_config
from adakron.engine.engine import TrainingEngine
from adakron.engine.partitioning import partitioned_loading
from adakron.launcher import World
from launch.program import run_program
from tests.benchmarks.partitioned_loading import Peak, held, load_classifier
from tests.helpers import tiny
from tests.helpers.launch import ROOT

STEPS, WIDTH, LAYERS = 4, 1024, 16
LARGEST = 4 * WIDTH * WIDTH
"""Elements of the largest parameter."""


def save_model(folder: Path) -> None:
    """The model and a tokenizer, as transformers saves them."""
    tiny.word_tokenizer().save_pretrained(folder)
    config = BertConfig(
        vocab_size=27, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=16, intermediate_size=4 * WIDTH, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).bfloat16().save_pretrained(folder, max_shard_size="64MB")


def source(way: str, nvme_path: Path) -> dict[str, Any]:
    """The DeepSpeed JSON: at ZeRO-3 no more than a few layers' parameters are whole at a time."""
    name = "zero2_fp32" if way == "whole" else "zero3_fp32"
    content = ds_config.read_json(str(ROOT / "ds_configs" / f"{name}.json"))
    if way != "whole":
        live = 3 * LARGEST
        content["zero_optimization"] |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    if way == "nvme":
        # DeepSpeed 0.19.8 reads ahead from NVMe what it holds already, and stops at an assertion ("already assigned swap buffer").
        content["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
        content["zero_optimization"]["offload_param"] = {
            "device": "nvme", "nvme_path": str(nvme_path), "buffer_count": 24, "buffer_size": LARGEST // 2, "pin_memory": False,
        }  # fmt: skip
    return content


@contextlib.contextmanager
def limited(mib: int | None, rank: int) -> Iterator[None]:
    """Inside, memory that this process begins to hold, beside files that can be read again, is at most so much."""
    if mib is None:
        yield
        return
    root = Path("/sys/fs/cgroup/memory")
    setting = "memory.limit_in_bytes" if root.is_dir() else "memory.max"
    root = root if root.is_dir() else root.parent
    mine = next(
        line.rsplit(":", 1)[1] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line or line[:3] == "0::"
    )
    group = root / f"adakron-{os.getpid()}-{rank}"
    group.mkdir()
    try:
        (group / setting).write_text(str(mib * 2**20))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (root / mine.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def measured(way: str, folder: Path, settings: ds_config.DeepSpeedSettings, world: World, device: torch.device) -> str:
    """Load, adapt, train; what that took."""
    before = held()
    with Peak() as loading:
        base = load_classifier(folder, partitioned_loading(settings, device) if way != "whole" else None)
        models.adapt(base.model, AdapterConfig(), seed=0, new_parameters=base.new_parameters)
        groups = trainable.trainable_groups(base.model, 0.0)
        engine = TrainingEngine(base.model, groups, settings, TrainingConfig(max_steps=STEPS), total_steps=STEPS, device=device)
    losses, seconds = [], []
    generator = torch.Generator().manual_seed(world.rank)
    with Peak() as training:
        for _ in range(STEPS):
            started = time.perf_counter()
            loss = engine(input_ids=torch.randint(5, 25, (2, 16), generator=generator)).logits.float().square().sum()
            engine.backward(loss, 2 * world.world_size)
            engine.step()
            seconds.append(time.perf_counter() - started)
            losses.append(round(float(loss.detach()), 6))
    return (
        f"peak while loading +{loading.mib - before:.0f} MiB, of training +{training.mib - before:.0f},"
        f" {statistics.median(seconds):.2f} s a step, losses {losses}"
    )


def main(arguments: Sequence[str], world: World) -> None:
    """Measure one way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("whole", "parts", "nvme"))
    parser.add_argument("--nvme_path", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--limit_mib", type=int, help="Of each rank. Default: none.")
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    given = parser.parse_args(arguments)
    device = distributed.select_device(world, os.environ)
    distributed.form_group(world, device)
    folder = Path(distributed.broadcast_object(tempfile.mkdtemp() if world.rank == 0 else None))
    if world.rank == 0:  # in a process of its own, whose memory goes with it
        maker = multiprocessing.get_context("spawn").Process(target=save_model, args=(folder,))
        maker.start()
        maker.join()
    distributed.barrier()
    values = ds_config.RunValues(micro_batch=2, accumulation=1, world_size=world.world_size, max_grad_norm=1.0)
    settings = ds_config.resolve(source(given.way, given.nvme_path), values)
    with limited(given.limit_mib, world.rank):
        line = f"{given.way}, rank {world.rank}: {measured(given.way, folder, settings, world, device)}"
    for shown in distributed.all_gather_object(line):
        if world.rank == 0:
            print(shown, flush=True)
    if world.rank == 0:
        shutil.rmtree(folder)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
