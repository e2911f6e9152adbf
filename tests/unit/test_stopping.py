"""What a rank of several tells the watch over its peers of a stop."""

import signal
from collections.abc import Callable

import pytest

from adakron import distributed
from adakron.signals import LAUNCHER_GONE, SignalListener
from adakron.stopping import StopAgreement, StopRequest


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], bool]]:
    found: list[Callable[[], bool]] = []

    class Watch:
        let_stop = staticmethod(found.append)

    monkeypatch.setattr(distributed, "peer_watch", Watch)
    return found


def test_time_is_asked_for_a_launcher_that_is_gone_and_not_for_any_signal(stopping):
    listener = SignalListener()
    StopAgreement(listener)
    assert not stopping[0]()
    listener.asked = signal.SIGTERM.name  # as launchers send it that end the others of a lost rank
    assert not stopping[0]()
    listener.asked = LAUNCHER_GONE
    assert stopping[0]()


def test_time_is_asked_for_a_stop_that_all_ranks_agreed_on(stopping):
    listener = SignalListener()
    agreement = StopAgreement(listener)
    agreement.boundary()
    assert not stopping[0]()
    listener.asked = signal.SIGTERM.name
    with pytest.raises(StopRequest):
        agreement.boundary()
    assert stopping[0]()
