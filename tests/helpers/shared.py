"""Where tests find the real data and the golden tensors, which lie beside the checkout and not in it."""

import os
from pathlib import Path

import pytest


def shared_data(name: str) -> Path:
    """The data folder or file `name`; skips the calling test where it is not on this machine."""
    return _find("data", name)


def shared_golden(name: str) -> Path:
    """The golden folder or file `name`; skips the calling test where it is not on this machine."""
    return _find("golden", name)


def _find(kind: str, name: str) -> Path:
    beside = Path(__file__).resolve().parents[2].parent / "shared"
    path = Path(os.environ.get("ADAKRON_SHARED", beside)) / kind / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here (ADAKRON_SHARED names the folder that holds {kind}/{name})")
    return path
