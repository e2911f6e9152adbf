from collections.abc import Iterator

import pytest
import torch

from adakron.determinism import CUBLAS_VARIABLE, compute_deterministically
from adakron.errors import ConfigError
from launch.failures import without_deterministic_kernel


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    yield
    torch.use_deterministic_algorithms(False)


def test_an_operation_without_a_deterministic_kernel_is_a_users_error():
    compute_deterministically()
    with pytest.raises(RuntimeError) as error:
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2), accumulate=False)
    assert "put_ has no deterministic kernel" in str(without_deterministic_kernel(error.value))
    assert without_deterministic_kernel(RuntimeError("another")) is None


def test_a_setting_of_cublas_that_contradicts_is_refused(monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, ":0:0")
    with pytest.raises(ConfigError, match=r"':0:0'; unset it"):
        compute_deterministically()
    assert not torch.are_deterministic_algorithms_enabled()
