"""Values that nobody should pass: for flags, recipes and JSON."""

from typing import Any

import numpy as np

from tests.helpers.fuzzing import pick

WORDS = (
    "", " ", "nan", "NaN", "inf", "-inf", "1e999", "-1", "0", "1", "true", "False", "no", "null", "None", "0x10", "1_000", "1.5", "2",
    "99999999999999999999", "9" * 400, "9" * 5000, "-0.0", "1e-400", "٣", "½", "\u202eevil", "\x1b[2J\x1b]0;owned\x07", "a\nb", "a\tb",
    "nul\0byte", "x" * 300, "y" * 100_000, "../" * 40 + "etc/passwd", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/environ",
    "~root/nothing", "%s%n", "{0.__class__}", "$(touch owned)", "`touch owned`", "; touch owned", "--help-me", "-", "--", "=", "a=b",
    "é" * 200, "\ud800", "🙂", "https://user:pw@example.org/x", "file:///etc/passwd", "hf://datasets/x", "a::b", "*", "[a-", "(a+)+$",
    "(.+)+x", "(.*)*#", "0-999999", "0,", "3-1", "1,1,1", "{}", "[]", "{\"r\": 8}", "!!python/object:os.system x", "eager", "epoch",
)  # fmt: skip

NUMBERS: tuple[Any, ...] = (0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**30, 0.0, 0.5, -0.5, 1.5, 1e-300, 1e300)

OTHERS: tuple[Any, ...] = (
    True, False, None, "", "auto", "x", "1", "true", "nan", [], {}, [1], {"a": 1}, [[]], {"enabled": True}, "\x1b[31m", "../../x",
    "/dev/zero", "é", "x" * 5000, list(range(300)), {str(key): key for key in range(100)},
)  # fmt: skip


def word(rng: np.random.Generator) -> str:
    """A word of the list, or random characters."""
    if rng.random() < 0.85:
        return pick(rng, WORDS)
    return "".join(chr(c) for c in rng.integers(1, 0x3000, size=int(rng.integers(1, 40))))


def plain(rng: np.random.Generator) -> Any:
    """A JSON value of any kind; sometimes nested."""
    if rng.random() < 0.08:
        nested: Any = 1
        for _ in range(int(rng.integers(3, 200))):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    if rng.random() < 0.2:
        return word(rng).encode("utf-8", "replace").decode()
    return pick(rng, NUMBERS if rng.random() < 0.45 else OTHERS)


def mutate(content: Any, rng: np.random.Generator, times: int = 1) -> tuple[Any, list[str]]:
    """A copy of nested JSON with some values replaced, removed, renamed or added; and the keys that were touched."""
    if not isinstance(content, dict | list):
        return plain(rng), []
    touched = []
    content = dict(content) if isinstance(content, dict) else list(content)
    for _ in range(times):
        keys: list[Any] = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            break
        key = pick(rng, keys)
        touched.append(str(key))
        how = rng.random()
        if isinstance(content[key], dict | list) and content[key] and how < 0.6:
            content[key], inner = mutate(content[key], rng)
            touched += inner
        elif how < 0.8 or isinstance(content, list):
            content[key] = plain(rng)
        elif how < 0.88:
            del content[key]
        elif how < 0.94:
            renamed = pick(rng, (str(key).upper(), f"{key} ", f"{key}s", "__class__", ""))
            content[renamed] = content.pop(key)
            touched.append(renamed)
        else:
            added = pick(rng, ("unknown", "zero_optimisation", "\x1b[31mred", "k" * 2000, "__init__", "optimizer", "peft_type"))
            content[added] = plain(rng)
            touched.append(added)
    return content, touched
