"""What may be shown and kept: secrets are taken out of texts, control characters are written out, long values are cut."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
"""What stands where a secret was."""

# Not a tokenizer's: pad_token, eos_token, ...
_WORDS = r"secret|password|passwd|passphrase|api[-_]?key|access[-_]?key|private[-_]?key|credentials?"
_TOKENIZERS = "".join(rf"(?<!{kind}[-_])" for kind in ("pad", "eos", "bos", "unk", "cls", "sep", "mask", "special"))
_NAME = rf"(?:{_TOKENIZERS}token|{_WORDS})"
_SECRET_NAME = re.compile(rf"(?i)(?:^|[-_.]){_NAME}$")
_BY_THEMSELVES: tuple[tuple[re.Pattern[str], str], ...] = (
    # Tokens that say by their first letters what they are: Hugging Face, OpenAI, GitHub, Slack, AWS, GitLab.
    (re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{8,}"), HIDDEN),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"), HIDDEN),
    (re.compile(r"\b(?:gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})\b"), HIDDEN),
    # https://user:password@host
    (re.compile(r"(?<=://)[^/\s'\"@]+@"), f"{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/._~=-]{8,}"), rf"\1 {HIDDEN}"),
)
_PATTERNS = (
    *_BY_THEMSELVES,
    # --hf_token=..., "api_key": "...", HF_TOKEN=..., ?token=...; what stands before the name is not looked at: that took quadratic time.
    (re.compile(rf"(?i)(?<![a-z])({_NAME}[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&\"'}}\])]+)"), rf"\1{HIDDEN}"),
)

_FILE = re.compile(r"/[^\s?]*")


def redact(text: str) -> str:
    """The text with tokens, passwords in addresses, and values behind names such as `api_key=` replaced by `HIDDEN`."""
    return _without(_PATTERNS, text)


def _without(patterns: Sequence[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in patterns:
        text = pattern.sub(replacement, text)
    return text


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line as it may be recorded: the value behind a flag such as --hf_token is hidden, too."""
    kept: list[str] = []
    hide = False
    for argument in arguments:
        kept.append(HIDDEN if hide and not argument.startswith("--") else redact(argument))
        hide = argument.startswith("-") and "=" not in argument and is_secret_name(argument)
    return kept


def is_secret_name(name: str) -> bool:
    """Whether a flag, key or variable of that name holds a secret: `hf_token`, `--api-key`, but not `max_tokens` or `pad_token_id`."""
    return _SECRET_NAME.search(name.lstrip("-")) is not None


def redact_values(content: Any) -> Any:
    """The same lists and objects with every text redacted, and the values of secret names hidden.

    An absolute path is opened again from the record: /data/token=1/x stays, and what is a token by its first letters is hidden.
    """
    if isinstance(content, str):
        return _without(_BY_THEMSELVES, content) if _FILE.fullmatch(content) else redact(content)
    if isinstance(content, dict):
        return {
            key: HIDDEN if isinstance(key, str) and is_secret_name(key) and isinstance(value, str) else redact_values(value)
            for key, value in content.items()
        }
    return [redact_values(value) for value in content] if isinstance(content, list | tuple) else content


def printable(text: str) -> str:
    """The text with all characters that move a cursor, colour a terminal or turn a line around written as escapes; one line."""
    return "".join(_escaped(character) if unicodedata.category(character) in _UNPRINTED else character for character in text)


# Control, format (among them the marks that turn text around), surrogate, private, line and paragraph separators.
_UNPRINTED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def _escaped(character: str) -> str:
    # Joiners make one sign of several in Persian, Hindi and emoji, and do nothing else.
    return character if character in "\u200c\u200d" else character.encode("unicode_escape").decode()


def shortened(text: str, limit: int = 1500) -> str:
    """The text, its middle left out where it is longer than `limit` characters: the remedy stands at its end."""
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end]} ... ({len(text):,} characters) ... {text[-end:]}"
