"""What asks a run to stop: signals, and a launcher that is gone. They only set a mark; the loop stops where all ranks can
(`adakron.stopping`).

Standard library only: a program listens before it imports what takes seconds.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time

from adakron.ancestors import watch_launchers

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and can go on later (EX_TEMPFAIL of sysexits.h)."""

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

LAUNCHER_GONE = "the end of its launcher"

REASONS = (*(number.name for number in ASKING), LAUNCHER_GONE)
"""Everything that can ask a run to stop, by the words of its messages."""

SECOND_WITHIN = 3.0
"""Two Ctrl-C within so many seconds: leave at once."""

_ONE_KEYPRESS = 0.3
"""A launcher may send on the Ctrl-C that the terminal already sent: what comes within so many seconds is one of them."""


class SignalListener:
    """Notes what asked to stop, one of REASONS, from the moment `listen` is called.

    A thread reads the numbers that Python's own C handler writes, so that a signal counts even while the main thread waits inside
    a collective or a library. Until `defer` there is nothing to save and perhaps no peer to agree with: a signal ends the process
    at once. Afterwards it sets `asked`, and only a second Ctrl-C ends the process.

    work, boundary: what is stopped and where, for the messages.
    """

    def __init__(self, work: str = "training", boundary: str = "at the next step, with a checkpoint") -> None:
        self._work, self._boundary = work, boundary
        self.asked: str | None = None
        self.started = time.monotonic()
        self._deferred = False
        self._last_interrupt: float | None = None

    def listen(self) -> None:
        """Start. Call it once, in the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        threading.Thread(target=self._watch, args=(reader, writer), daemon=True, name="signals").start()
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in ASKING:
            signal.signal(number, lambda *_: None)  # the thread does the work; without a handler the process would end here
        # Until a rank has its log (`adakron.log.keep_log`): where it stands, on standard error.
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        watch_launchers(lambda: self._note(LAUNCHER_GONE))

    def defer(self) -> None:
        """From now on a signal asks, and does not end the process."""
        self._deferred = True

    def _watch(self, reader: socket.socket, writer: socket.socket) -> None:
        # `writer` is held here: were it collected, its number would go to another file.
        while number := reader.recv(1):
            if number[0] in ASKING:
                self._note(signal.Signals(number[0]).name)

    def _note(self, received: str) -> None:
        if not self._deferred:
            # Whichever rank was signalled says so: a signal to one alone ends all, and the others only know that it is gone.
            _say(f"{_of_rank()}stopped by {received} before {self._work} began; nothing was written")
            os._exit(EXIT_STOPPED)
        now = time.monotonic()
        if received == signal.SIGINT.name:
            since = now - self._last_interrupt if self._last_interrupt is not None else None
            if since is not None and _ONE_KEYPRESS < since <= SECOND_WITHIN:
                leave(EXIT_INTERRUPTED, "interrupted twice: left at once; what was saved can be resumed from")
            if since is None or since > SECOND_WITHIN:
                self._last_interrupt = now
        if self.asked is None:
            self.asked = received
            if os.environ.get("LOCAL_RANK", "0") == "0":
                hint = f" (Ctrl-C twice within {SECOND_WITHIN:g} s leaves at once)" if received == signal.SIGINT.name else ""
                _say(f"{received}: stopping {self._boundary}{hint}")


def leave(code: int, text: str) -> None:
    """End this process now, without any clean-up: what it was writing is not visible yet."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _say(text)
    os._exit(code)


def _of_rank() -> str:
    # srun's tasks have their number before `launcher.join` gives them RANK.
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    return f"rank {rank}: " if rank != "0" else ""


def _say(text: str) -> None:
    # A terminal or pipe that is gone must not cost the checkpoint.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
