"""Compiling, keeping and finding kernels; what is said where that cannot be."""

import re
import stat
from pathlib import Path

import pytest
import torch

from adakron.nn import native


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    native.unload()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "adakron"
    native.unload()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_they_are_compiled_once(own_cache, monkeypatch, tmp_path):
    calls = tmp_path / "calls"
    monkeypatch.setenv("CXX", str(script(tmp_path / "compiler", f'echo "$@" >> {calls}; exec g++ "$@"')))
    problem = native.load()
    if problem is not None:
        pytest.skip(problem)
    assert native.takes(torch.zeros(1)) and native.takes(torch.zeros(1, dtype=torch.bfloat16))
    assert not native.takes(torch.zeros(1, dtype=torch.float16)) and not native.takes(torch.zeros(1, device="meta"))
    native.unload()
    assert not native.takes(torch.zeros(1))
    assert native.load() is None
    assert sum("-shared" in line for line in calls.read_text().splitlines()) == 1
    assert [file.suffix for file in own_cache.iterdir()] == [".so"]


def test_another_compiler_makes_others(own_cache, monkeypatch, tmp_path):
    if native.load() is not None:
        pytest.skip("no compiler")
    native.unload()
    monkeypatch.setenv("CXX", str(script(tmp_path / "compiler", 'exec g++ "$@"')))
    assert native.load() is None
    assert len(list(own_cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("/nowhere/c++", r"no compiler /nowhere/c\+\+ \(install g\+\+, or name one in \$CXX\)"), ("", "failed: no such option")],
)
def test_without_a_compiler_the_reason_is_said(own_cache, monkeypatch, tmp_path, compiler, message):
    monkeypatch.setenv("CXX", compiler or str(script(tmp_path / "compiler", "echo no such option >&2; exit 1")))
    problem = native.load()
    assert problem is not None
    assert re.search(message, problem), problem
    assert native.load() == problem and not native.takes(torch.zeros(1))
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_a_cache_that_cannot_be_written_is_a_reason(own_cache, tmp_path):
    (tmp_path / "cache").write_text("a file")
    problem = native.load()
    assert problem is not None and str(own_cache.parent) in problem


def test_a_broken_library_is_a_reason(own_cache):
    try:
        library = native._built()
    except FileNotFoundError:
        pytest.skip("no compiler")
    library.unlink()
    library.write_text("not a library")
    problem = native.load()
    assert problem is not None and str(library) in problem
