"""The extra [peft] is optional: without it there is nothing to collect here."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("peft") else ["test_*.py"]

IGNORED = (
    # FRoD makes a sparse matrix in each forward pass, and torch reminds once per process of checks that are off.
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
    # PEFT up to 0.21.2 reads a property that transformers 5 renamed, whenever it wraps a model.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "unit/peft" in item.path.as_posix():
            for line in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(line))
