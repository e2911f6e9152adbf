"""Compiling, keeping and finding kernels; what is said where that cannot be."""

import re
import shutil
import stat
from pathlib import Path

import pytest
import torch

from adakron.errors import ConfigError
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


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ('g++ "', "which is no command line"),
        ("true", "true made no library"),
        ("without_functions", "undefined symbol: adakron_"),
        ("talkative", "failed: kernels.cpp:1: error: no such type"),
    ],
)
def test_whatever_cxx_names_torch_computes_and_the_reason_is_said(own_cache, monkeypatch, tmp_path, compiler, message):
    """Words no shell takes, what compiles nothing, a library without kernels, errors behind a list of includes."""
    empty = 'case "$*" in *-shared*) while [ "$1" != -o ]; do shift; done; echo "int x;" | exec g++ -xc++ - -shared -fPIC -o "$2";; esac'
    scripts = {
        "without_functions": empty,
        "talkative": 'echo "In file included from kernels.cpp" >&2; echo "kernels.cpp:1: error: no such type" >&2; exit 1',
    }
    if compiler == "without_functions" and shutil.which("g++") is None:
        pytest.skip("no compiler")
    monkeypatch.setenv("CXX", str(script(tmp_path / "compiler", scripts[compiler])) if compiler in scripts else compiler)
    problem = native.load()
    assert problem is not None and message in problem, problem
    assert not native.takes(torch.zeros(1))


def test_a_cache_that_cannot_be_made_is_not_taken_for_the_compiler(monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nowhere")
    problem = native.load()
    if problem is not None and "no compiler g++" in problem:
        pytest.skip(problem)
    assert problem is not None and "/proc/nowhere" in problem and "compiler" not in problem


def test_a_broken_library_is_a_reason(own_cache):
    try:
        library = native._built()
    except ConfigError as error:
        pytest.skip(str(error))
    library.unlink()
    library.write_text("not a library")
    problem = native.load()
    assert problem is not None and str(library) in problem
