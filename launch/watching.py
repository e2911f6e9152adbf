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
def watched(folder: Path, world: World, total_steps: int) -> Iterator[Heartbeat]:
    """The heartbeat of a run, which says at the end how it ended. All ranks together; the folder is claimed."""
    distributed.on_rank_0(lambda: (folder / run_folder.LOGS_FOLDER).mkdir(exist_ok=True))
    try:
        keep_log(run_folder.rank_log(folder, world.rank))
    except OSError as error:  # the folder is not shared, say; the run does not depend on it, and what does says so itself
        logger.warning("%s is not kept (%s)", run_folder.rank_log(folder, world.rank), error.strerror)
    hosts = distributed.all_gather_object(socket.gethostname())
    heartbeat = Heartbeat(folder / run_folder.HEARTBEAT_FILE if world.rank == 0 else None, total_steps, hosts)
    try:
        yield heartbeat
    except StopRequest:
        heartbeat.doing("stopped")
        raise
    except BaseException:
        heartbeat.doing("failed")
        raise
    heartbeat.doing("finished")
