import os
import re
import signal
import time

import pytest

from adakron.untrusted import DEPTH, YAML_BYTES, UnreadableError, parse_json, parse_yaml, read_text, time_limit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1e999}', "beyond the range of a float"),
        ('{"a": ' + "9" * 400 + "}", "beyond the range of a float"),
        ('{"a": 1, "a": 2}', "key a appears twice"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("[" * (DEPTH + 2) + "]" * (DEPTH + 2), f"more than {DEPTH}"),
        ("[" * 100_000, f"more than {DEPTH}"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, said):
    with pytest.raises(UnreadableError, match=said):
        parse_json(text)


def test_json_that_is_read():
    assert parse_json("[" * DEPTH + "]" * DEPTH)
    assert parse_json('{"a": [1, 2.5, null, true, "x", 1e300]}') == {"a": [1, 2.5, None, True, "x", 1e300]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x 1\nb: *x", "alias"),
        ("a: 1\na: 2", "appears twice"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: !!int x", "number, time or tag"),
        ("a: !!timestamp x", "number, time or tag"),
        ("a: 2026-99-99", "number, time or tag"),
        ("a: " + "[" * 5000, "inside one another"),
        ("a: 0x" + "f" * 6000, "beyond the range"),
        ("x" * (YAML_BYTES + 1), "bytes of YAML"),
    ],
)
def test_yaml_that_is_refused(text, said):
    with pytest.raises(UnreadableError, match=said):
        parse_yaml(text)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "long").write_bytes(b"x" * 11)
    (tmp_path / "bad").write_bytes(b"ab\xff")
    found = {"pipe": "it is a pipe", "loop": "symbolic links", "long": "it has 11 bytes", "bad": r"byte 3 \(0xff\)", ".": "a folder"}
    for name, said in found.items():
        with pytest.raises(UnreadableError, match=said):
            read_text(tmp_path / name, 10)
    with pytest.raises(UnreadableError, match="it is a device"):
        read_text("/dev/zero", 10)
    with pytest.raises(UnreadableError, match="null byte"):
        read_text("a\0b")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


def test_a_time_limit_counts_what_is_computed_and_not_what_is_waited_for():
    with time_limit(0.1, "waiting"):
        time.sleep(0.3)


def test_a_time_limit_ends_a_match_and_leaves_other_alarms():
    left = []
    before = signal.signal(signal.SIGVTALRM, lambda number, frame: left.append(number))
    other = signal.setitimer(signal.ITIMER_VIRTUAL, 50)
    try:
        started = time.perf_counter()
        with pytest.raises(UnreadableError, match="matching takes more than"), time_limit(0.2, "matching"):
            re.fullmatch("(.+)+x", "a" * 60)
        assert time.perf_counter() - started < 5
        assert 40 < signal.getitimer(signal.ITIMER_VIRTUAL)[0] < 51  # rounded up to the kernel's ticks
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *other)
        signal.signal(signal.SIGVTALRM, before)
    assert not left
