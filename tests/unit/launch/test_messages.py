import errno

import pytest

from adakron.errors import CheckpointError, ConfigError
from launch.messages import explained, paragraph


def test_a_paragraph_is_safe_and_short():
    shown = paragraph(ConfigError(["output_dir is '\x1b[2J" + "x" * 90_000 + "' (set --output_dir)", "token=abcdef\nerror: fake"]))
    assert shown.count("\n") == 2 and "\x1b" not in shown and "abcdef" not in shown and len(shown) < 3500
    assert shown.startswith("error: 2 problems\n  - output_dir is") and "(set --output_dir)" in shown
    many = paragraph(ConfigError([f"problem {number}" for number in range(500)]))
    assert many.startswith("error: 500 problems") and many.endswith("and 480 more") and len(many) < 1000
    assert paragraph(CheckpointError("one")) == "error: one"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: the operating system says 'no space left on device'; free some"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "the operating system says 'file name too long'; choose a shorter name"),
        (MemoryError(), "the memory of this machine is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "the memory of this machine is full"),
    ],
)
def test_what_the_machine_refuses_is_a_sentence(error, said):
    assert said in (explained(error) or "")


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError("x"), OSError(errno.ECHILD, "x"), KeyError("x")])
def test_bugs_stay_bugs(error):
    assert explained(error) is None
