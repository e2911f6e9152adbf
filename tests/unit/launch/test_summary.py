"""The table at the end of a run."""

import pytest

from launch.summary import wall_time


@pytest.mark.parametrize(
    ("resumed_from", "said"),
    [
        (0, "52.3 s, 40.1 s of it training"),
        (7, "52.3 s since it went on at step 7; 40.1 s of training in all"),  # in all may be more than this process ran
    ],
)
def test_the_time_of_this_process_is_told_from_that_of_all(resumed_from: int, said: str) -> None:
    assert wall_time({"wall_seconds": 52.31, "train_runtime": 40.12, "resumed_from_step": resumed_from}) == said
