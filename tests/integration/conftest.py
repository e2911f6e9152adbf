from pathlib import Path

import pytest

from tests.helpers import tiny


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer BERT without dropout."""
    return tiny.save_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training, 23 validation and 5 test sentences in GLUE's SST-2 columns."""
    return tiny.write_classification(tmp_path_factory.mktemp("tiny-data"))
