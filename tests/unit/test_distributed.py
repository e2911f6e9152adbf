import pytest

from adakron.distributed import on_rank_0
from adakron.errors import ConfigError


def test_rank_0_speaks_for_all():
    assert on_rank_0(lambda: 5) == 5

    def fail() -> None:
        raise ConfigError("taken")

    with pytest.raises(ConfigError, match="taken"):
        on_rank_0(fail)
