"""Ranks that hear of another one's end, both in this process, at a store of their own."""

import gc
import queue
import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from adakron import peers
from adakron.peers import PeerWatch
from adakron.redaction import HIDDEN


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.2)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_what_must_end_first_ends_before_the_rank_does(store):
    happened: list[str] = []
    lost = threading.Event()

    def write() -> None:
        time.sleep(0.6)  # longer than the grace
        happened.append("written")

    def end(reason: str) -> None:
        happened.append(reason)
        lost.set()

    mine = PeerWatch("127.0.0.1", store.port, 0, 2, end)
    mine.finish_first(write)
    other = PeerWatch("127.0.0.1", store.port, 1, 2, lambda reason: None)
    other.report("ValueError: no, with --hub_token=s3cret")
    assert lost.wait(10)
    mine.stop()
    assert happened == ["written", f"rank 1 ended first: ValueError: no, with --hub_token={HIDDEN}"]


def watched_until_lost(monkeypatch: pytest.MonkeyPatch, stopping: Callable[[], bool], *, failed: bool = False) -> str:
    """What a rank is ended for whose store is gone, or where another rank failed."""
    lost: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.05)
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine = PeerWatch("127.0.0.1", master.port, 0, 2, lost.put)
    mine.let_stop(stopping)
    if failed:
        PeerWatch("127.0.0.1", master.port, 1, 2, lambda reason: None).report("ValueError: no")
    else:
        del master
        gc.collect()
    try:
        return lost.get(timeout=30)
    finally:
        mine.stop()


def test_a_store_that_is_gone_waits_for_the_last_step_and_its_checkpoint(monkeypatch):
    steps = iter([True] * 20)
    assert "the store that the ranks met in is gone" in watched_until_lost(monkeypatch, lambda: next(steps, False))
    assert next(steps, None) is None  # as long as the rank was stopping


def test_it_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(peers, "FINISH_SECONDS", 0.3)
    asked: list[bool] = []
    assert "is gone" in watched_until_lost(monkeypatch, lambda: not asked.append(True))
    assert len(asked) > 1


def test_a_rank_that_failed_does_end_one_that_stops(monkeypatch):
    asked: list[bool] = []
    assert "rank 1 ended first: ValueError" in watched_until_lost(monkeypatch, lambda: not asked.append(True), failed=True)
    assert not asked
