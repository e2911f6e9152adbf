"""Training states on the disk, and the thread that writes them."""

import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from adakron.checkpoint import TENSORS_FILE, TRAINING_STATE_FILE, BackgroundWriter, read_training_state, write_training_state
from adakron.engine.state import KINDS, EngineState, LossScaleState
from adakron.errors import CheckpointError
from adakron.metrics import MetricRecorder
from adakron.train_state import Due, RankState, Snapshot, Sums, TrainState, random_states, restore_rank

CPU = torch.device("cpu")


def snapshot(**changes: Any) -> Snapshot:
    tensors = {kind: {"a.weight": torch.randn(3, 2), "b": torch.randn(1)} for kind in KINDS}
    engine = EngineState(tensors, {"a.weight": 4, "b": 4}, 4, 1, 0, LossScaleState(256.0, 5, 1, 2))
    ranks = [
        RankState(
            random_states(CPU),
            {"train/loss": ("sum", [0.1 + rank, 0.3]), "train/x": ("max", [float(rank)])},
            {"window": [0.5], "pending": [0.1 + rank]},
        )
        for rank in (0, 1)
    ]
    values = {
        "engine": engine, "train": TrainState(global_step=4, best_metric=0.5, log_history=[{"step": 2, "loss": 0.1}]),
        "sums": Sums(epoch=1, batches=2, seconds=0.1, window=(0.1, 3, 9)), "due": Due(evaluation=True), "best": {"b": torch.ones(1)},
        "best_scores": {"eval_loss": 0.1}, "last_scores": (4, {"eval_loss": 0.2}), "ranks": ranks,
    }  # fmt: skip
    return Snapshot(**(values | changes))


def same(one: Snapshot, other: Snapshot) -> bool:
    tensors = all(
        torch.equal(one.engine.tensors[kind][name], other.engine.tensors[kind][name]) for kind in KINDS for name in ("a.weight", "b")
    )
    best = (one.best is None) == (other.best is None) and (
        one.best is None or other.best is None or torch.equal(one.best["b"], other.best["b"])
    )
    rest = [
        (s.train, s.sums, s.due, s.best_scores, s.last_scores, s.ranks, s.engine.loss_scale, s.engine.steps, s.step) for s in (one, other)
    ]
    return tensors and best and rest[0] == rest[1]


@pytest.mark.parametrize("changes", [{}, {"best": None, "best_scores": None, "last_scores": None}])
def test_what_is_written_is_read(tmp_path, changes):
    written = snapshot(**changes)
    write_training_state(tmp_path, written, {"seed": 1})
    read = read_training_state(tmp_path)
    assert same(read.snapshot, written)
    assert read.run == {"seed": 1}


def test_every_damage_is_one_error(tmp_path):
    write_training_state(tmp_path, snapshot(), {})
    for name in (TRAINING_STATE_FILE, TENSORS_FILE, "trainer_state.json"):
        file = tmp_path / name
        content = file.read_bytes()
        for damaged in (b"", content[: len(content) // 2], content[:-1] if name == TENSORS_FILE else b"[]", b"\xff" * 20):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"cannot be resumed from|damaged"):
                read_training_state(tmp_path)
        file.unlink()
        with pytest.raises(CheckpointError, match=f"has no {name}"):
            read_training_state(tmp_path)
        file.write_bytes(content)
    state = json.loads((tmp_path / TRAINING_STATE_FILE).read_text())
    (tmp_path / TRAINING_STATE_FILE).write_text(json.dumps(state | {"format_version": 2}))
    with pytest.raises(CheckpointError, match=r"^\S*training_state.json: format_version is 2"):
        read_training_state(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("ranks",), []),
        (("ranks", 1, "random"), {}),
        (("ranks", 0, "random", "torch"), "AAAA"),
        (("ranks", 0, "random", "torch"), 3),
        (("ranks", 0, "random", "numpy"), ["MT19937", "AAAA", 0, 0, 0.0]),
        (("ranks", 0, "random", "python"), [3, "!", None]),
        (("ranks", 0, "unlogged"), {"train/loss": ["sum", ["x"]]}),
        (("ranks", 0, "unlogged"), {"train/loss": ["median", [1.0]]}),
        (("ranks", 0, "spikes"), {"window": []}),
    ],
)
def test_what_a_rank_cannot_go_on_with_is_damage(tmp_path, place, value):
    write_training_state(tmp_path, snapshot(), {})
    before = torch.get_rng_state()
    read_training_state(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    content = json.loads((tmp_path / TRAINING_STATE_FILE).read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / TRAINING_STATE_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its training state is damaged"):
        read_training_state(tmp_path)


def test_random_generators_go_on(tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    write_training_state(tmp_path, snapshot(), {})

    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    expected = draws()
    read = read_training_state(tmp_path).snapshot
    restore_rank(read, 1, 2, 0, CPU)
    assert draws() == expected
    # Another number of ranks: streams of their own, the same at every try.
    tries = [(restore_rank(read, rank, 3, 0, CPU), draws())[1] for rank in (0, 1, 0)]
    assert tries[0] == tries[2] != tries[1] != expected


def test_unlogged_metrics_reduce_to_the_same_over_another_number_of_ranks():
    saved = snapshot()
    for ranks in (1, 3):
        shares = [restore_rank(saved, rank, ranks, 0, CPU)[0] for rank in range(ranks)]
        loss = [sum(share["train/loss"][1][step] for share in shares) for step in (0, 1)]
        assert loss == pytest.approx([1.2, 0.6])
        assert max(share["train/x"][1][0] for share in shares) == 1.0
    recorder, again = MetricRecorder(), MetricRecorder()
    for value in (0.1, 0.7):
        recorder.record("train/loss", torch.tensor(value))
    again.restore(recorder.unlogged())
    assert again.flush() == recorder.flush()


def test_one_write_at_a_time_and_its_error_is_not_lost():
    writer = BackgroundWriter()
    may_end, order = threading.Event(), []

    def slow() -> None:
        may_end.wait(10)
        order.append("first")

    writer.submit(slow)
    assert order == []  # the caller goes on
    threading.Timer(0.1, may_end.set).start()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]

    def full() -> None:
        raise CheckpointError("checkpoint-3 could not be written")

    writer.submit(full)
    with pytest.raises(CheckpointError, match="checkpoint-3 could not be written"):
        writer.submit(lambda: order.append("fourth"))
    writer.wait()
    assert order == ["first", "second"]


def test_a_writer_that_settled_goes_on(tmp_path):
    writer = BackgroundWriter()
    written = []

    def slow() -> None:
        time.sleep(0.2)
        written.append("slow")
        raise OSError(28, "No space left on device")

    writer.submit(slow)
    writer.settle()
    assert written == ["slow"]
    with pytest.raises(OSError, match="No space left"):
        writer.wait()  # settling kept it
    writer.submit(lambda: written.append("next"))
    writer.wait()
    assert written == ["slow", "next"]
    writer.close()


def test_settling_finds_a_write_that_another_thread_waits_for():
    writer = BackgroundWriter()
    written = threading.Event()

    def slow() -> None:
        time.sleep(0.4)
        written.set()

    writer.submit(slow)
    waiting = threading.Thread(target=writer.wait)
    waiting.start()
    time.sleep(0.1)
    writer.settle()
    assert written.is_set()
    waiting.join()
    writer.close()
