"""What a program prints when it fails: one paragraph, that shows no secret and cannot write to a terminal as it likes."""

import difflib
import errno
from collections.abc import Iterable

from adakron.errors import AdaKronError
from adakron.memory import is_out_of_memory
from adakron.redaction import printable, redact, shortened

_SHOWN_PROBLEMS = 20

# What the operating system may answer to a name or a disk of the user's, and what to do about it.
_REMEDIES = {
    errno.ENOSPC: "free some space, or name another folder",
    errno.EDQUOT: "free some of your quota, or name another folder",
    errno.EROFS: "name another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "name what the link should point to",
    errno.ENOTDIR: "a part of the path is a file; name another",
    errno.EISDIR: "name a file",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "look at the disk",
    errno.ESTALE: "look at the network file system",
}


def paragraph(error: AdaKronError | str) -> str:
    """The error for a terminal: a line, or one for each of several problems."""
    problems = list(getattr(error, "problems", ())) or [line for line in str(error).split("\n") if line.strip()] or ["unknown"]
    shown = [shortened(printable(redact(problem))) for problem in problems[:_SHOWN_PROBLEMS]]
    if len(shown) == 1:
        return f"error: {shown[0]}"
    more = [f"  - and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n".join([f"error: {len(problems)} problems", *(f"  - {problem}" for problem in shown), *more])


def explained(error: BaseException) -> str | None:
    """A sentence for what the machine refused (a full disk, memory, a name), with the remedy; None for every other exception."""
    if is_out_of_memory(error):
        on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        whose = "the memory of this machine" if on_host else "the GPU's memory"
        return (
            f"{whose} is full ({_first_line(error)}); in training lower --per_device_train_batch_size, or let --auto_micro_batch find one"
            " that fits (docs/memory.md); elsewhere use a smaller batch, model or file, or another machine"
        )
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        place = f"{names}: " if names else ""
        return f"{place}the operating system says {(error.strerror or '').lower()!r}; {_REMEDIES[error.errno]}"
    return None


def did_you_mean(flag: str, known: Iterable[str]) -> str:
    """What the message about an unknown flag ends with: those of the known ones that it may stand for. Ours have underscores."""
    ours = [option for option in known if "-" not in option.lstrip("-")]  # transformers adds --a-b beside --a_b
    name = "--" + flag.lstrip("-").replace("-", "_")
    near = [name] if name in ours else difflib.get_close_matches(name, ours, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else "; --help lists every flag"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
