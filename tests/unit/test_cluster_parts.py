"""Why the tests on a cluster are skipped, on machines that cannot make one."""

import os
from pathlib import Path

import pytest

from tests.cluster import parts


def test_only_root_makes_hosts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "not root" in (parts.obstacle() or "")


def test_what_is_missing_is_named_with_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(parts, "search_path", lambda: str(tmp_path))
    reason = parts.obstacle(parts.SLURM) or ""
    assert "no ip, unshare" in reason
    assert "apt-get install iproute2" in reason


def test_nothing_is_installed_without_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(parts, "search_path", lambda: str(tmp_path))
    parts.main()
    assert "SKIPPED: not root, and" in capsys.readouterr().out
