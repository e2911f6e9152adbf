"""Ranks that hear of another one's end, both in this process, at a store of their own."""

import threading
import time

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
