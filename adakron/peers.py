"""What the ranks of a run know of each other when collectives fail: who lives, who ended and why.

A collective that fails says that some connection closed, or that it waited too long, never which rank is to blame. So each rank
counts its signs of life in the store that the process group was formed with, and writes there how it ended.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from adakron.redaction import redact

T = TypeVar("T")

BEAT_SECONDS = 1.0
"""Between two signs of life of a rank: one short message to the store, from a thread."""

SILENT_BEATS = 3
"""A rank whose count stands still for so many beats gives no sign of life."""

GRACE_SECONDS = 15.0
"""How long a rank that another one's end concerns may go on before it is ended, too: it may stand in something that never returns."""

FINISH_SECONDS = 600.0
"""How long what must end first (a checkpoint that is being written, a stop that was asked for) may put that off."""

STORE_SECONDS = 5.0
"""How long an answer of the store is waited for: its host may be the rank that was lost."""

_PREFIX = "adakron/peers"


class PeerWatch:
    """Signs of life of this rank, and ears for the end of others. One per process group of several ranks.

    on_lost: called, from a thread, with what is known where another rank failed and this one goes on GRACE_SECONDS later; it must
    end the process, whose main thread may never return.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int, on_lost: Callable[[str], None]):
        self._rank = rank
        self._world_size = world_size
        self._on_lost = on_lost
        self._store = self._connect(host, port)  # for the thread alone: a store serves one caller at a time
        self._main_store = self._connect(host, port)
        self._stopped = threading.Event()
        self._heard = ""
        self._finish: Callable[[], None] | None = None
        self._stopping: Callable[[], bool] = lambda: False
        self._store_answers = True
        self._store.add(self._beats_of(rank), 1)
        threading.Thread(target=self._beat, name="sign of life", daemon=True).start()

    @staticmethod
    def _connect(host: str, port: int) -> dist.TCPStore:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS))

    def stop(self) -> None:
        """Before the ranks part: the end of another one is no failure from here on."""
        self._stopped.set()

    def finish_first(self, finish: Callable[[], None]) -> None:
        """What to wait for, at most FINISH_SECONDS, when the grace of this rank is over. Called from a thread, beside whatever runs."""
        self._finish = finish

    def let_stop(self, stopping: Callable[[], bool]) -> None:
        """stopping: whether this rank makes its last step and saves. Then a store that is gone does not end it, for FINISH_SECONDS
        beyond its grace: the store was perhaps the launcher's, whose end is why it stops. Called from a thread.
        """
        self._stopping = stopping

    def report(self, reason: str) -> None:
        """Tell the others that this rank ends, and why. They print it: secrets are taken out."""

        def write() -> None:
            self._main_store.set(f"{_PREFIX}/end/{self._rank}", redact(reason))
            self._main_store.append(f"{_PREFIX}/ended", f"{self._rank},")  # type: ignore[attr-defined]  # missing in torch's stubs
            self._main_store.compare_set(f"{_PREFIX}/first", "", str(self._rank))

        self.stop()
        self._ask(STORE_SECONDS, write, None)

    def linger(self) -> None:
        """Stay for two signs of life, in which the others hear what was reported: the store may end with this process."""
        if self._store_answers:
            time.sleep(2 * BEAT_SECONDS)

    def said(self, rank: int, seconds: float = 2.0) -> str | None:
        """Why a rank ended, waiting for its word for a while; None where it says nothing."""
        return self._ask(seconds + STORE_SECONDS, lambda: self._end_of(rank, time.monotonic() + seconds), None)

    def _end_of(self, rank: int, until: float) -> str | None:
        key = f"{_PREFIX}/end/{rank}"
        while not self._main_store.check([key]):
            if time.monotonic() > until:
                return None
            time.sleep(0.1)
        return self._main_store.get(key).decode()

    def account(self) -> str:
        """Who is to blame for a collective that failed, as far as the store knows. Takes some seconds."""
        if self._heard:
            return self._heard
        gone = "the store that the ranks met in does not answer: its host, rank 0 or the launcher beside it, is gone or stands still"
        return self._ask(SILENT_BEATS * BEAT_SECONDS + STORE_SECONDS, self._account, gone)

    def _account(self) -> str:
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        before = self._beats(others)
        time.sleep(SILENT_BEATS * BEAT_SECONDS)
        after = self._beats(others)
        ended = {int(rank) for rank in self._value(f"{_PREFIX}/ended").split(",") if rank}
        first = self._value(f"{_PREFIX}/first")
        said = []
        if first and int(first) in ended:
            said.append(f"rank {first} ended first: {self._main_store.get(f'{_PREFIX}/end/{first}').decode()}")
        silent = [rank for rank in others if before[rank] == after[rank] and rank not in ended]
        if silent:
            said.append(f"{_ranks(silent)} no sign of life: killed, stopped, or cut off")
        late = [rank for rank in others if rank not in silent and rank not in ended]
        if late and not silent and not first:
            said.append(f"{_ranks(late)} signs of life, but did not come to where this rank waited")
        return "; ".join(said) or "no other rank says why"

    def _value(self, key: str) -> str:
        return str(self._main_store.get(key).decode()) if self._main_store.check([key]) else ""

    def _beats(self, ranks: list[int]) -> dict[int, bytes]:
        keys = [self._beats_of(rank) for rank in ranks]
        if not self._main_store.check(keys):  # one ended before its first; what is not there would be waited for
            for key in keys:
                self._main_store.add(key, 0)
        # In one request: each of a thousand ranks may ask for those of all.
        return dict(zip(ranks, self._main_store.multi_get(keys), strict=True))

    @staticmethod
    def _beats_of(rank: int) -> str:
        return f"{_PREFIX}/beats/{rank}"

    def _ask(self, seconds: float, function: Callable[[], T], otherwise: T) -> T:
        """What the function gets from the store, or the other value where it fails or takes longer: it is then left behind in its thread,
        and the store not asked again.
        """
        found: list[T] = []

        def run() -> None:
            with contextlib.suppress(RuntimeError):
                found.append(function())

        if self._store_answers:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(seconds)
            self._store_answers = bool(found)
        return found[0] if found else otherwise

    def _beat(self) -> None:
        noticed: float | None = None
        store_gone = False
        while not self._stopped.wait(BEAT_SECONDS):
            if noticed is None:
                try:
                    self._store.add(self._beats_of(self._rank), 1)
                    if not self._store.check([f"{_PREFIX}/first"]):
                        continue
                    first = self._store.get(f"{_PREFIX}/first").decode()
                    self._heard = f"rank {first} ended first: {self._store.get(f'{_PREFIX}/end/{first}').decode()}"
                except RuntimeError:  # every error of the store is one
                    self._heard = "the store that the ranks met in is gone: its host, rank 0 or the launcher beside it, ended"
                    self._store_answers, store_gone = False, True
                noticed = time.monotonic()
            elif time.monotonic() > noticed + GRACE_SECONDS:
                left = noticed + GRACE_SECONDS + FINISH_SECONDS - time.monotonic()
                if store_gone and left > 0 and self._stopping():
                    continue
                if self._finish is not None:
                    ending = threading.Thread(target=self._finish, name="finish first", daemon=True)
                    ending.start()
                    ending.join(max(left, 0.0))
                    if self._stopped.wait(BEAT_SECONDS):
                        return  # what it waited for was this rank's own end, which comes with its own words
                self._on_lost(self._heard)
                return


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown} gives" if len(ranks) == 1 else f"ranks {shown} give"


def address() -> tuple[str, int]:
    """Host and port of the store that a launcher's process group meets in."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
