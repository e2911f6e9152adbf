"""Kill a forked process at one of its system calls, whichever library makes it: ptrace, on Linux."""

import ctypes
import os
import signal
from collections.abc import Callable

# <sys/ptrace.h>, the same numbers on every architecture.
_TRACEME = 0
_SYSCALL = 24
_SETOPTIONS = 0x4200
_TRACESYSGOOD = 0x1
_EXITKILL = 0x100000
_SYSCALL_STOP = signal.SIGTRAP | 0x80

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def can_trace() -> bool:
    """Whether this system lets a process trace its child."""
    try:
        return killed_at(1, lambda: None)
    except OSError:
        return False


def killed_at(call: int, work: Callable[[], None]) -> bool:
    """Run work in a fork that is killed (SIGKILL) right before its call-th system call, from 1 on; False where it ended before that.

    Raises RuntimeError where work itself fails.
    """
    pid = os.fork()
    if pid == 0:
        _child(work)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSTOPPED(status):
        raise OSError(os.WEXITSTATUS(status), f"ptrace: {os.strerror(os.WEXITSTATUS(status))}")
    _ptrace(_SETOPTIONS, pid, _TRACESYSGOOD | _EXITKILL)
    entered, inside = 0, False
    while True:
        _ptrace(_SYSCALL, pid)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise RuntimeError(f"the traced work failed, exit code {os.WEXITSTATUS(status)}")
            return False
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the traced work died of signal {os.WTERMSIG(status)}")
        if os.WSTOPSIG(status) != _SYSCALL_STOP:
            continue
        inside = not inside
        entered += inside
        if inside and entered == call:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True


def _child(work: Callable[[], None]) -> None:
    try:
        _ptrace(_TRACEME, 0)
    except OSError as error:
        os._exit(error.errno or 1)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)
