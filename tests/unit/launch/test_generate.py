"""What launch/generate.py refuses before it loads anything, and what it takes for one generation."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adakron.config import GenerationConfig
from adakron.errors import AdaKronError, ConfigError
from adakron.launcher import World
from adakron.row_store import Row, RowStore
from adakron.run_lock import RunLock
from adakron.tasks.causal import Prompts
from launch.generate import main
from launch.generated_files import check_output, description, folder_of, publish_rows
from launch.saved_run import SavedRun, open_run, saved_run_parser
from launch.score import read_references
from tests.helpers.saved_runs import write_run
from tests.helpers.tiny import save_byte_gpt2, save_tiny_bert, write_classification, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_jsonl(folder / "data" / "test.jsonl", [{"source": "a", "target": "b"}])
    save_byte_gpt2(folder / "model")
    return write_run(folder / "run", folder / "model", seed=1, task_name="pairs", data_dir=str(folder / "data"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--text", "a", "--source_file", "b"], "--text and --source_file are both given; drop one"),
        (["--text", "a", "--text", " "], "--text number 2 holds no source"),
        (["--text", "a", "--split", "test"], "--text gives the sources; drop --split, or --text"),
        (["--text", "a", "--output_file", "b"], "--text gives the sources; drop --output_file, or --text"),
        (["--source_file", "a", "--test_file", "b"], "--source_file gives the sources; drop --test_file"),
        (["--source_file", "a"], "--source_file needs a file to write; name it with --output_file"),
        (["--output_file", "texts_0.8"], "output_file is texts_0.8; it must end in .jsonl"),
        (["--task_name", "lm"], "task_name is lm, which has no sources to generate from; those of e2e_nlg"),
        (["--text", "a", "--task_name", "sst2"], "task_name is sst2, which has no sources"),
        (["--text", "\udcff"], "the argument '\\udcff' holds bytes that are no UTF-8"),
        (["--text", "a", "--length_penalty", "400"], "length_penalty is 400.0; scores are divided by a length of up to 64 to this power"),
        (["--text", "a", "--length_penalty=-17"], "length_penalty is -17.0"),
        (["--text", "a", "--repetition_penalty", "1e-40"], "repetition_penalty is 1e-40; it must be a positive number from 1e-06"),
        (["--text", "a", "--eos_token_id", ",".join(map(str, range(257)))], "names all of the tokenizer's 257 tokens"),
        (["--max_hours", "0"], "max_hours is 0.0; it must be a positive number of hours"),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size is 0; it must be at least 1"),
        (["--num_beams", "0"], "num_beams is 0; it must be at least 1"),
        (["--without_adapter", "--inference_level", "3"], "--without_adapter leaves it out; drop one"),
        (["--split", "validation"], "no split validation among the data"),
        (["--source_file", "absent.txt", "--output_file", "b.jsonl"], "--source_file absent.txt: cannot be read"),
    ],
)
def test_what_is_refused(run: Path, words: Sequence[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main([str(run), *words], World())
    assert problem in str(caught.value)


def test_a_task_without_texts_is_refused(tmp_path: Path) -> None:
    data = write_classification(tmp_path / "data")
    folder = write_run(
        tmp_path / "run", save_tiny_bert(tmp_path / "bert"), seed=0, task_name="sst2", data_dir=str(data), options={"num_labels": 2}
    )
    with pytest.raises(ConfigError, match=r"is a run of task sst2, which generates no texts; those of e2e_nlg, .*pairs do"):
        main([str(folder)], World())


@pytest.mark.parametrize("content", ["", "a\n\nb\n"])
def test_lines_without_a_source_are_refused(run: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "sources.txt"
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds no source; give one"):
        main([str(run), "--source_file", str(file), "--output_file", str(tmp_path / "out.jsonl")], World())


def test_a_line_is_a_source_whatever_it_holds(run: Path, tmp_path: Path) -> None:
    sources = ["a\u2028b", "a\x0cb \x85 c", "a"]
    file, output = tmp_path / "sources.txt", tmp_path / "out.jsonl"
    file.write_bytes("\r\n".join(sources).encode() + b"\n")
    main([str(run), "--source_file", str(file), "--output_file", str(output), "--num_beams", "1", "--max_new_tokens", "2"], World())
    assert [json.loads(line)["source"] for line in output.read_text(encoding="utf-8").split("\n")[:-1]] == sources
    assert len((tmp_path / "out.hypotheses.txt").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("other", ["5", "1"])
def test_what_finished_meanwhile_is_not_overwritten(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    output = tmp_path / "out.jsonl"
    words = [str(run), "--output_file", str(output), "--max_new_tokens", "3", "--num_beams"]

    def slowly(*given: object, **options: object) -> SavedRun:
        monkeypatch.undo()
        main([*words, "1"], World())  # while the second one still loads its model
        return open_run(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("launch.generate.open_run", slowly)
    with pytest.raises(ConfigError, match=r"out.jsonl, .* would be overwritten; name another file with --output_file"):
        main([*words, other], World())
    assert len(output.read_text(encoding="utf-8").splitlines()) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.hypotheses.txt", "out.jsonl", "out.references.txt"]


def test_a_file_that_another_generation_writes_is_refused_with_its_own_flag(run: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out.jsonl")
    folder.mkdir()
    with RunLock(folder), pytest.raises(ConfigError, match=r"is being written by process .* or name another file with --output_file"):
        main([str(run), "--output_file", str(tmp_path / "out.jsonl"), "--max_new_tokens", "2", "--num_beams", "1"], World())


def two_prompts(**changes: object) -> Prompts:
    prompts = Prompts(np.arange(4, dtype=np.int32), np.array([0, 2, 4]), [["x y", "z"], ["w"]], ["a", "b"], ["seen", "unseen"])
    return replace(prompts, **changes)  # type: ignore[arg-type]


def test_what_makes_other_texts_is_another_generation(run: Path) -> None:
    options = saved_run_parser("").parse([str(run)])
    opened = open_run(options, World())
    settings = GenerationConfig()

    def described(prompts: Prompts = two_prompts(), other: GenerationConfig = settings, bare: bool = False) -> Row:  # noqa: B008
        return description(opened, other, prompts, (256,), unchecked=False, bare=bare)

    first = described()
    assert described() == first
    assert first["eos_token_id"] == [256] and first["num_beams"] == 10 and first["precision"] == "fp32"
    others = [
        described(two_prompts(input_ids=np.array([0, 1, 2, 9], dtype=np.int32))),
        described(two_prompts(references=[["x y"], ["z", "w"]])),
        described(other=GenerationConfig(length_penalty=0.9)),
        described(bare=True),
    ]
    assert all(other != first for other in others)
    weights = run / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert described()["adapter"] != first["adapter"]
    finally:
        weights.write_bytes(content)


def test_files_of_a_finished_generation(tmp_path: Path) -> None:
    output, prompts = tmp_path / "out.jsonl", two_prompts()
    check_output(output)
    store = RowStore(folder_of(output), {}, 2)
    with store.writer(1) as writer:
        writer.append([{"index": 1, "tokens": [1, 2], "text": "d\n\ne"}])
    with pytest.raises(ConfigError, match="lacks 1 of 2 rows, the first of them 0"):
        publish_rows(store, prompts, output)
    with store.writer(0) as writer:
        writer.append([{"index": 0, "tokens": [], "text": ""}])
    output.write_text("a generation was killed while it published")
    check_output(output)
    publish_rows(store, prompts, output)
    assert output.read_text().splitlines() == [
        '{"index": 0, "source": "a", "text": "", "references": ["x y", "z"], "category": "seen"}',
        '{"index": 1, "source": "b", "text": "d\\n\\ne", "references": ["w"], "category": "unseen"}',
    ]
    assert (tmp_path / "out.hypotheses.txt").read_text() == "\nd e\n"
    assert (tmp_path / "out.references.txt").read_text() == "x y\nz\n\nw\n"
    # What launch/score.py reads, with categories and without.
    assert read_references(str(output), 2) == ([["x y", "z"], ["w"]], ["seen", "unseen"])
    assert read_references(str(tmp_path / "out.references.txt"), 2) == ([["x y", "z"], ["w"]], None)
    assert len([*tmp_path.iterdir()]) == 3
    with pytest.raises(ConfigError, match=r"out.jsonl, .*out.hypotheses.txt, .*out.references.txt would be overwritten"):
        check_output(output)
    with pytest.raises(AdaKronError, match="cannot be made"):
        check_output(output / "inside.jsonl")


def test_without_the_adapter_it_is_the_backbone(run: Path) -> None:
    options = saved_run_parser("").parse([str(run)])
    ids = torch.arange(6)[None]
    with torch.no_grad():
        bare, own = (open_run(options, World(), with_adapter=which).model(input_ids=ids).logits for which in (False, True))
    plain: nn.Module = open_run(options, World()).model
    for module in plain.modules():
        if hasattr(module, "adakron_adapter"):
            module.enabled = False  # type: ignore[assignment]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, bare)
    assert not torch.equal(own, bare)
