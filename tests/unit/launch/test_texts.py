from pathlib import Path

import pytest

from adakron.errors import ConfigError, DataError
from adakron.launcher import World
from launch import texts
from tests.helpers.tiny import write_jsonl

ALONE = World(rank=0, local_rank=0, world_size=1)


def test_targets_alone_are_written_a_line_each_in_a_seeded_order(tmp_path: Path) -> None:
    said = [f"The Eagle\nserves {number} dishes." for number in range(30)]
    rows = [{"meaning_representation": "name[The Eagle], food[Fish]", "human_reference": text} for text in said]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    data = f"e2e_nlg={tmp_path / 'data'}"
    lines = {}
    for name, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        texts.main([data, "--output_dir", str(tmp_path / name), "--seed", seed], ALONE)
        lines[name] = (tmp_path / name / "e2e_nlg.txt").read_text().splitlines()
    assert sorted(lines["one"]) == sorted(f" The Eagle serves {number} dishes." for number in range(30))
    assert lines["one"] == lines["again"] != lines["two"]
    with pytest.raises(ConfigError, match="is there already"):
        texts.main([data, "--output_dir", str(tmp_path / "one")], ALONE)
    for wrong in ("sst2=x", "e2e_nlg", data):
        with pytest.raises(ConfigError):
            texts.main([wrong, data, "--output_dir", str(tmp_path / "none")], ALONE)
    assert not (tmp_path / "none").exists()


def test_bad_data_is_named_with_what_was_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs=.*nowhere: data_dir is .*nowhere, which is missing"):
        texts.main([f"pairs={tmp_path / 'nowhere'}", "--output_dir", str(tmp_path / "none")], ALONE)
