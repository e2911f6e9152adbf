"""What a saved run is not taken for."""

from pathlib import Path

import pytest

from adakron.errors import ConfigError
from adakron.launcher import World
from launch import evaluate, predict
from tests.helpers.saved_runs import write_run
from tests.helpers.tiny import save_tiny_bert, write_classification


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    (folder / "words.conll").write_text("the O\nfilm B-X\n")
    data = write_classification(folder / "data")
    bert = save_tiny_bert(folder / "bert")
    return write_run(folder / "run", bert, seed=0, task_name="sst2", data_dir=str(data), options={"num_labels": 2})


def test_a_task_of_another_head_is_refused(run: Path) -> None:
    words = str(run.parent / "words.conll")
    for main, arguments in (
        (predict.main, ["--task_name", "ner", "--test_file", words]),
        (evaluate.main, ["--task_name", "ner", "--validation_file", words]),
        (evaluate.main, ["--task_name", "squad_v1", "--validation_file", words]),
    ):
        with pytest.raises(ConfigError, match=r"task_name is (ner|squad_v1), which needs .* as AutoModelForSequence.*; drop --task_name"):
            main([str(run), *arguments], World())


def test_an_argument_that_is_no_text_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"the argument 'a\\udcff' holds bytes that are no UTF-8; give text in UTF-8"):
        predict.main([str(run), "--text", "a\udcff"], World())
