"""How a program of several ranks ends when one of them fails: quickly, on all ranks, with one paragraph that names the rank."""

import contextlib
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from adakron import distributed
from adakron.distributed import EXIT_LOST_RANK
from adakron.errors import ConfigError
from adakron.launcher import World
from adakron.log import keep, kept_in
from adakron.redaction import redact

# What gloo, NCCL and torch's store say when another rank closed its connection or kept this one waiting.
_LOST = re.compile(
    r"Connection (closed by peer|reset by peer|refused|timed out|was likely closed)|Broken pipe|No route to host|Socket [Tt]imeout"
    r"|Timed out waiting|Timed out after .* waiting for clients|[Ww]ait timeout|timed out in|failed to (recv|send|connect)"
    r"|remote process exited|connectFullMesh|Application timeout|NCCL communicator was aborted|ncclRemoteError|ncclSystemError"
)
_WISH = re.compile(r"\s*GLHF!.*")  # gloo's, behind its messages
_NO_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception is a collective's that another rank failed."""
    text = str(error)
    of_torch = isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text or "c10d" in text or "Timed out waiting" in text
    return isinstance(error, RuntimeError) and of_torch and _LOST.search(text) is not None


def without_deterministic_kernel(error: BaseException) -> ConfigError | None:
    """The user's error where an exception says that an operation has no kernel for --deterministic."""
    found = _NO_DETERMINISTIC.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return ConfigError(f"deterministic is set, but {found.group(1)} has no deterministic kernel on this device; drop --deterministic")


def end_rank(error: BaseException, world: World, code: int, paragraph: str | None) -> NoReturn:
    """End this rank of several after an exception: its word on standard error and to the other ranks, then out at once.

    paragraph: what to print instead of the traceback. Nothing is cleaned up: leaving a group whose ranks are gone can wait for
    ever, and what its threads still wait for no longer comes.
    """
    watch = distributed.peer_watch()
    if is_lost_peer(error):
        code, first_line = EXIT_LOST_RANK, _WISH.sub("", str(error)).strip().splitlines()[0]
        blame = watch.account() if watch is not None else "it was lost while the process group formed"
        own = kept_in()
        logs = f"; what each rank said: {own.with_name('rank*.log')}" if own is not None else ""
        say(f"error: rank {world.rank} lost another rank ({blame}); what this rank saw: {first_line[:300]}{logs}")
        if watch is not None:
            watch.report(f"it lost another rank ({blame})")
    elif paragraph is None:
        said = "".join(traceback.format_exception(error))
        say(f"rank {world.rank}:\n{said}")
        _tell_torchrun(error)
        if watch is not None:
            watch.report(f"{type(error).__name__}: {error}"[:2000])
    else:
        _tell_torchrun(error)
        if watch is not None:
            watch.report(paragraph[:2000])
        # Mostly all ranks say the same, and once per host is enough; but a rank may be the only one.
        speaker = world.rank - world.local_rank
        if world.local_rank == 0 or watch is None or watch.said(speaker) != paragraph[:2000]:
            say(paragraph)
    if watch is not None:
        watch.linger()
    sys.stdout.flush()
    os._exit(code)


def _tell_torchrun(error: BaseException) -> None:
    """Write the file that torchrun shows of the rank that failed first; it names the place for it in the environment, others do not."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    # As torch.distributed.elastic.multiprocessing.errors.ErrorHandler writes it, without secrets.
    trace = redact("".join(traceback.format_exception(error)))
    extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
    content = {"message": {"message": redact(f"{type(error).__name__}: {error}"), "extraInfo": extra}}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps(content), encoding="utf-8")


def say(text: str) -> None:
    """A paragraph on standard error, which may be closed already, and in this rank's log; without secrets."""
    with contextlib.suppress(OSError):
        print(redact(text), file=sys.stderr, flush=True)
    keep(text)
