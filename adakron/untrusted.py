"""Reading files that anybody may have written: JSON, YAML and plain text, of bounded size, depth and time, never anything that runs.

Whatever is wrong ends in an UnreadableError with one line of reason; the caller names the file, the flag and the remedy.
"""

import json
import os
import signal
import stat
import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

JSON_BYTES = 64 * 2**20
"""Longest JSON file: a backbone's tokenizer of 250,000 words takes 17 MB."""

YAML_BYTES = 128 * 2**10
"""Longest YAML file; the parser takes a second for that much, and a recipe has 2 KB."""

DEPTH = 64
"""Deepest nesting of lists and objects."""

_YAML_SECONDS = 20.0
_LONGEST_INTEGER_BITS = 1023  # of a whole number that is still a finite float


class UnreadableError(ValueError):
    """A file is not what it should be; the message is the reason, without the file's name."""


def read_text(path: str | Path, limit: int = JSON_BYTES) -> str:
    """The content of a UTF-8 file, a byte order mark taken off.

    Raises UnreadableError where it is no regular file (a pipe would be waited for, a device has no end), has more than `limit`
    bytes, or is not UTF-8; FileNotFoundError where there is none.
    """
    try:
        # Not blocking: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise UnreadableError(f"it is {kind_of(found.st_mode)}, not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnreadableError(f"it has {max(found.st_size, len(content)):,} bytes, at most {limit:,} are read")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"byte {error.start + 1} ({content[error.start]:#04x}) is not UTF-8") from error


def kind_of(mode: int) -> str:
    """What a file that is not regular is, for messages."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_json(path: str | Path, limit: int = JSON_BYTES) -> Any:
    """What a JSON file holds; see `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """What JSON says. Raises UnreadableError on what RFC 8259 does not allow or leaves open.

    That is NaN, Infinity and numbers beyond a float's range, an object's key twice, text that is no Unicode (half of a surrogate
    pair), and more than DEPTH lists and objects inside one another.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except UnreadableError:
        raise
    except RecursionError:
        raise UnreadableError(f"more than {DEPTH} lists and objects lie inside one another") from None
    except ValueError as error:
        raise UnreadableError(str(error)) from error
    _check(content)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise UnreadableError(f"key {_twice([key for key, _ in pairs])} appears twice")
    return content


def _twice(keys: list[str]) -> str:
    return ", ".join(sorted(key for key, count in Counter(keys).items() if count > 1))


def _no_constant(name: str) -> NoReturn:
    raise UnreadableError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise UnreadableError(f"the number {digits[:40]} is beyond the range of a float")
    return number


def _check(content: Any) -> None:
    """Depth, numbers and text, level by level: what was read may be nested deeper than Python recurses."""
    level = [content]
    for _ in range(DEPTH + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER_BITS:
                raise UnreadableError("a whole number is beyond the range of a float")
            elif isinstance(value, dict):
                for key in value:
                    if isinstance(key, str):
                        _check_text(key)
                below += value.values()
            elif isinstance(value, list | tuple | set):
                below += value
        if not below:
            return
        level = below
    raise UnreadableError(f"more than {DEPTH} lists and objects lie inside one another")


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(f"{value[:40]!r} holds half of a surrogate pair, which is no text") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML of plain values: no aliases (ten lines of them make a billion values), and the same key twice is an error."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"alias *{event.anchor} on line {event.start_mark.line + 1}; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [str(key.value) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError(f"key {_twice(keys)} appears twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, limit: int = YAML_BYTES) -> Any:
    """What a YAML file holds; see `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, limit))


def parse_yaml(text: str) -> Any:
    """What one YAML document says, in plain values. Raises UnreadableError; see `_StrictLoader` for what is not allowed."""
    if len(text.encode(errors="replace")) > YAML_BYTES:
        raise UnreadableError(f"at most {YAML_BYTES:,} bytes of YAML are read")
    try:
        with time_limit(_YAML_SECONDS, "reading it"):
            content = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except RecursionError:
        raise UnreadableError(f"more than {DEPTH} lists and objects lie inside one another") from None
    except UnreadableError:
        raise
    except yaml.YAMLError as error:
        raise UnreadableError(" ".join(str(error).split())) from error
    # The safe constructors raise whatever Python does with a tag's text: `!!int x`, `!!timestamp x`, 2026-99-99.
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise UnreadableError("a number, time or tag is followed by what is none") from error
    _check(content)
    return content


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End a block that computes longer with an UnreadableError; what: the doing, for the message. Waiting (a slow disk) does not count.

    seconds: of this process's own time on the CPU, all threads together. For code that looks for signals (Python's own, its regular
    expressions). Without effect outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise UnreadableError(f"{what} takes more than {seconds:g} seconds")

    handler = signal.signal(signal.SIGVTALRM, stop)
    # Somebody else's alarm comes first where it is due first, and is set again afterwards.
    left, interval = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, left, interval)
        signal.signal(signal.SIGVTALRM, handler)
