"""How every program starts and ends: rank-aware logging, one paragraph per error, true exit codes."""

import atexit
import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from adakron import distributed, launcher
from adakron.errors import AdaKronError, ConfigError
from adakron.launcher import World
from adakron.log import get_logger, setup_logging
from adakron.signals import EXIT_INTERRUPTED, EXIT_STOPPED
from adakron.stopping import StopRequest
from launch.failures import end_rank, is_lost_peer, say, without_deterministic_kernel
from launch.messages import explained, paragraph

EXIT_ERROR = 2
"""Exit code of an error that the user can mend."""

SPEAKER_SECONDS = 10.0
"""How long the silent ranks of a host wait for the one that says an error of all."""

_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")

EXIT_UNEXPECTED = 1
"""Exit code of an unexpected exception, as Python has it. A rank that lost another one leaves with `distributed.EXIT_LOST_RANK`."""

logger = get_logger(__name__)


def execute(main: Callable[[Sequence[str], World], int | None]) -> NoReturn:
    """Run a program's main (see `run_program`) and end this process with its exit code.

    Without the interpreter's own finalisation: a thread of gloo's may still be giving back the tensors of the last collective,
    and where it asks for an interpreter that is going away, the process dies of "terminate called without an active exception"
    (-6) after its work is done. Groups that DeepSpeed keeps have such threads until the very end.
    """
    try:
        code = run_program(main)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong flag, its message printed
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        say("".join(traceback.format_exception(error)))
        code = EXIT_UNEXPECTED
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # `| head` has seen enough
            stream.flush()
    os._exit(code)


def run_program(main: Callable[[Sequence[str], World], int | None]) -> int:
    """Run a program's main with the command line and this process's place; the exit code: what main returns, None being 0.

    An error is printed once per host, where the launcher ends the other ranks: all ranks of a host see the same files and flags.
    """
    quiet_libraries()
    try:
        world = launcher.read_world(os.environ)
        launcher.join(world, os.environ)
    except AdaKronError as error:
        if any(os.environ.get(name, "0") != "0" for name in _LOCAL_RANKS):
            _let_the_speaker_speak()
        print(paragraph(error), file=sys.stderr, flush=True)
        return EXIT_ERROR
    setup_logging(world.rank)
    threads = launcher.use_threads(world, os.environ)
    if world.world_size > 1:
        logger.info("%s", launcher.described(world, os.environ, threads))
    try:
        return main(sys.argv[1:], world) or 0
    except StopRequest as stop:
        if world.local_rank == 0:
            say(str(stop))  # whoever read standard error may be what asked, by its end
        return EXIT_STOPPED
    except Exception as error:
        known = error if isinstance(error, AdaKronError) else without_deterministic_kernel(error)
        of_this_host = explained(error) if known is None else None
        reason = known or of_this_host
        code = EXIT_ERROR if reason else EXIT_UNEXPECTED
        if world.world_size > 1 and (distributed.peer_watch() is not None or is_lost_peer(error)):
            end_rank(error, world, code, paragraph(reason) if reason else None)
        if reason is None:
            raise
        # What one rank's disk or memory refused, another's may not have.
        if not of_this_host and world.local_rank > 0:
            _let_the_speaker_speak()
        say(paragraph(reason))
        return code
    except KeyboardInterrupt:
        if world.local_rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    finally:
        distributed.leave_group()


def refuse_launcher(world: World) -> None:
    """ConfigError where a launcher started several processes of a program that runs in one."""
    if world.world_size > 1:
        raise ConfigError(f"this program runs in one process, and a launcher started {world.world_size}; start it with python")


def refuse_idle_tasks(world: World) -> None:
    """ConfigError where a program that runs in several processes was started beside srun, alone in a Slurm job that has more tasks."""
    if world.idle_tasks:
        raise ConfigError(
            f"the Slurm job has {world.idle_tasks + 1} tasks, and this process was started alone, not by srun; start it with srun"
            " (docs/multinode.md), with deepspeed or torchrun, or in one process with srun --ntasks 1"
        )


def _let_the_speaker_speak() -> None:
    """Wait, on the ranks of a host that are silent, for the one that says the same error.

    A launcher ends the others as soon as one leaves, and this one may be the first, while the speaker still reads the input. The
    speaker's end then ends this one; where it does not come, the error is not the speaker's, and this rank says it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's; there is nothing left to stop
    time.sleep(SPEAKER_SECONDS)


def quiet_libraries() -> None:
    """Silence the known harmless lines of the libraries, each by name."""
    # huggingface tokenizers warns when a process forks after use; nothing here forks with a tokenizer in hand.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # torch 2.13 renamed the collectives that DeepSpeed 0.19.8 still calls at ZeRO-3.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(all_gather_into_tensor|reduce_scatter_tensor).*")
