"""What shows from outside how a run is doing: each rank's log and the heartbeat, both in the run's folder."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from adakron import distributed, run_folder
from adakron.heartbeat import Heartbeat
from adakron.launcher import World
from adakron.log import get_logger, keep_log
from adakron.stopping import StopRequest

logger = get_logger(__name__)


@contextlib.contextmanager
def watched(folder: Path, world: World, total_steps: int, step: int = 0) -> Iterator[Heartbeat]:
    """The heartbeat of a run, which says at the end how it ended. step: where it goes on. All ranks together; the folder is claimed."""
    log = run_folder.rank_log(folder, world.rank)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)  # on every rank: hosts may have a folder of this name each
        keep_log(log)
    except OSError as error:  # the run does not depend on it
        if world.local_rank == 0:
            logger.warning("%s is not kept (%s)", log, error.strerror)
    hosts = distributed.all_gather_object(socket.gethostname())
    heartbeat = Heartbeat(folder / run_folder.HEARTBEAT_FILE if world.rank == 0 else None, total_steps, hosts, step)
    try:
        yield heartbeat
    except StopRequest:
        heartbeat.doing("stopped")
        raise
    except BaseException:
        heartbeat.failed()
        raise
    heartbeat.doing("finished")
