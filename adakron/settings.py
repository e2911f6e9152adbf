"""The base of the configuration classes: fields that are flags, and checks of their values. Standard library only."""

import dataclasses
import math
import re
from dataclasses import field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from adakron.errors import ConfigError

LONGEST_NAME = 4000
"""Most characters of a text setting: paths of Linux have at most 4095 bytes."""

LONGEST_TEXT = 128 * 2**10
"""Most characters of method_config, which holds the content of a file."""

LONGEST_PART = 255
"""Most bytes of one part of a path on Linux."""

_PATH_ENDINGS = ("_dir", "_file", "_path", "tokenizer_name", "deepspeed")  # of the settings that name files and folders

# Control characters, and halves of surrogate pairs: bytes of the command line that are no UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")


def flag(default: Any, text: str, *aliases: str) -> Any:
    """A dataclass field that is a command-line flag: its default, its help text and other spellings of the flag."""
    metadata: dict[str, Any] = {"help": text}
    if aliases:
        metadata["aliases"] = list(aliases)
    return field(default=default, metadata=metadata)


class Settings:
    """Base of the configuration dataclasses: checks `Literal` fields, then what `problems()` finds, all at once."""

    def __post_init__(self) -> None:
        found = self._type_problems() or self._choice_problems() + self._text_problems()
        found += self.problems() if not found else []
        if found:
            raise ConfigError(found)

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each; empty when all is well."""
        return []

    def _type_problems(self) -> list[str]:
        # Values of a saved run or of a Python caller never passed a parser.
        found = []
        for name, hint in get_type_hints(type(self)).items():
            options = [*get_args(hint)] or [hint]
            kinds = tuple(kind for kind in options if isinstance(kind, type))
            if any(get_origin(option) is Literal for option in (hint, *options)):
                continue
            value = getattr(self, name)
            accepted = (*kinds, int) if float in kinds else kinds
            if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
                names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
                found.append(f"{name} is {value!r}; it must be {names} (set --{name})")
        return found

    def _choice_problems(self) -> list[str]:
        # argparse checks choices only on the command line: a value from YAML or Python arrives here unchecked.
        found = []
        for name, hint in get_type_hints(type(self)).items():
            options = [hint, *get_args(hint)]
            choices = [c for option in options if get_origin(option) is Literal for c in get_args(option)]
            value = getattr(self, name)
            if choices and value not in choices and not (value is None and type(None) in options):
                found.append(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
        return found

    def _text_problems(self) -> list[str]:
        # Such texts name no file that could be made, and would break the log, the terminal or the files they are recorded in.
        found = []
        for name in get_type_hints(type(self)):
            value = getattr(self, name)
            if not isinstance(value, str):
                continue
            limit = LONGEST_TEXT if name == "method_config" else LONGEST_NAME
            if len(value) > limit:
                found.append(f"{name} has {len(value):,} characters; it must have at most {limit:,} (set --{name})")
            elif name != "method_config" and _UNPRINTABLE.search(value):
                found.append(f"{name} is {value!r}; it must be text without control characters (set --{name})")
            elif name.endswith(_PATH_ENDINGS) and any(len(part.encode()) > LONGEST_PART for part in value.split("/")):
                found.append(f"{name} is {value!r}; each part of a path must have at most {LONGEST_PART} bytes (set --{name})")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, in the order of their definition."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def positive_problems(settings: Settings, *names: str) -> list[str]:
    """What is wrong with fields that must be at least 1, or None."""
    return [
        f"{name} is {getattr(settings, name)}; it must be at least 1 (set --{name})"
        for name in names
        if getattr(settings, name) is not None and getattr(settings, name) < 1
    ]


def negative_problems(settings: Settings, *names: str) -> list[str]:
    """What is wrong with fields that must be finite and at least 0."""
    return [
        f"{name} is {getattr(settings, name)}; it must be a finite number, at least 0 (set --{name})"
        for name in names
        if not (math.isfinite(getattr(settings, name)) and getattr(settings, name) >= 0)
    ]
