"""What a checkpoint holds and costs: `python -m tests.benchmarks.checkpoints`.

A randomly initialised RoBERTa of the large shape (24 layers, width 1024) with K = 16 adapters takes a few steps in one process. In
the same run DeepSpeed's own `save_checkpoint` is timed beside ours, with and without the frozen parameters.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from adakron import distributed, models, trainable
from adakron.checkpoint import BackgroundWriter, read_training_state, write_training_state
from adakron.config import AdapterConfig, TrainingConfig
from adakron.engine import ds_config
from adakron.engine.engine import TrainingEngine
from adakron.launcher import World
from adakron.train_state import Due, RankState, Snapshot, Sums, TrainState, random_states

BATCH, TOKENS, STEPS, SAVES = 8, 64, 3, 5


def size(folder: Path) -> str:
    """Of all files, in MB."""
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:,.2f}"


def seconds(work: Callable[[], object], times: int = SAVES) -> float:
    """Median over several times."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    """Print the table."""
    device = torch.device("cpu")
    distributed.form_group(World(), device)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    models.adapt(model, AdapterConfig(bottleneck_dim=16), seed=0)
    training = TrainingConfig(per_device_train_batch_size=BATCH, max_steps=100, warmup_steps=0, warmup_ratio=0.0)
    source = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    values = ds_config.RunValues(micro_batch=BATCH, accumulation=1, world_size=1, max_grad_norm=1.0)
    engine = TrainingEngine(
        model, trainable.trainable_groups(model, 0.0), ds_config.resolve(source, values), training, total_steps=100, device=device
    )
    tokens = torch.randint(3, config.vocab_size, (BATCH, TOKENS))

    def step() -> None:
        logits = engine(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
        engine.backward(torch.nn.functional.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64), reduction="sum"), BATCH)
        engine.step()

    step()
    a_step = seconds(step, STEPS)

    def snapshot() -> Snapshot:
        ranks = [RankState(random_states(device), {}, {"window": [], "pending": []})]
        return Snapshot(engine.state(), TrainState(), Sums(), Due(), None, None, None, ranks)

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    machine = f"one process, {torch.get_num_threads()} thread, {os.cpu_count()} cores"
    print(f"{trained:,} of {everything:,} parameters train; bf16, ZeRO-2, {machine}")
    print(f"a step of {BATCH} x {TOKENS} tokens: {a_step:.2f} s\n")
    print("| | MB | the step waits, s | of a step | written after, s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        ours = home / "ours"
        ours.mkdir()
        writer = BackgroundWriter()

        def save() -> None:
            taken = snapshot()
            writer.submit(lambda: write_training_state(ours, taken, {}))

        waits, writes = [], []
        for _ in range(SAVES):
            waits.append(seconds(save, 1))
            writes.append(seconds(writer.wait, 1))
        wait = statistics.median(waits)
        print(f"| ours | {size(ours)} | {wait:.3f} | {wait / a_step:.1%} | {statistics.median(writes):.3f} |")
        for exclude in (True, False):
            theirs = home / f"theirs-{exclude}"
            taken = seconds(lambda t=theirs, e=exclude: engine._engine.save_checkpoint(str(t), tag="x", exclude_frozen_parameters=e), 3)  # type: ignore[misc]
            name = "DeepSpeed's save_checkpoint" + (", exclude_frozen_parameters" if exclude else "")
            print(f"| {name} | {size(theirs)} | {taken:.3f} | {taken / a_step:.1%} | 0 |")
        resume = seconds(lambda: engine.load_state(read_training_state(ours).snapshot.engine))
        print(f"\nresuming (reading and loading, without data to replay): {resume:.3f} s")


if __name__ == "__main__":
    main()
