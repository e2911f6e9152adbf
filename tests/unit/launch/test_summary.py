"""The table at the end of a run."""

import pytest

from adakron.config import DataConfig, TrainingConfig
from adakron.tasks import create_task
from launch.summary import programs_for, wall_time


@pytest.mark.parametrize(
    ("task_name", "programs"),
    [
        ("sst2", {"predict": ["--text", "your text"]}),
        ("mrpc", {"predict": ["--text", "your text", "--text_pair", "its second text"]}),
        ("squad_v1", {"predict": ["--question", "your question", "--context", "where the answer is"]}),
        ("ner", {"predict": ["--test_file", "new.conll"]}),
        ("e2e_nlg", {"generate": ["--text", "your source"]}),
        ("lm", {}),
    ],
)
def test_what_uses_a_trained_task(task_name: str, programs: dict[str, list[str]]) -> None:
    assert programs_for(create_task(DataConfig(task_name=task_name), TrainingConfig())) == programs


@pytest.mark.parametrize(
    ("resumed_from", "said"),
    [
        (0, "52.3 s, 40.1 s of it training"),
        (7, "52.3 s since it went on at step 7; 40.1 s of training in all"),  # in all may be more than this process ran
    ],
)
def test_the_time_of_this_process_is_told_from_that_of_all(resumed_from: int, said: str) -> None:
    assert wall_time({"wall_seconds": 52.31, "train_runtime": 40.12, "resumed_from_step": resumed_from}) == said
