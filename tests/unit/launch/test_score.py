"""`launch/score.py`: the layouts it reads, what it prints, and its errors."""

import json
from pathlib import Path

import pytest

from adakron.errors import AdaKronError, ConfigError, DataError
from adakron.launcher import World
from adakron.scores import score_texts
from launch import score
from tests.helpers.launch import ROOT, python

TEXTS = ["a cheap pub", "", "Café \u2028 Søren"]
REFERENCES = [["a cheap pub", "a pub"], ["nothing"], ["Café Søren"]]
GROUPED = "a cheap pub\na pub\n\nnothing\n\nCafé Søren\n"


def run(folder: Path, hypotheses: str | bytes, references: str, *flags: str, suffix: str = "txt") -> None:
    (folder / "hyp.txt").write_bytes(hypotheses if isinstance(hypotheses, bytes) else hypotheses.encode())
    (folder / f"ref.{suffix}").write_text(references, encoding="utf-8")
    score.main([str(folder / "hyp.txt"), str(folder / f"ref.{suffix}"), *flags], World())


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == 3
    return dict(found["scores"])


@pytest.mark.parametrize("ending", ["", "\n", "\n\n\n"])
def test_the_layout_of_the_e2e_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    run(tmp_path, "\n".join(TEXTS), GROUPED.rstrip("\n") + ending, "--profile", "e2e", "--json")
    assert printed(capsys) == score_texts(TEXTS, REFERENCES, profile="e2e")


def test_one_reference_per_line_and_windows_line_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "\r\n".join(TEXTS) + "\r\n", "one\r\ntwo\r\nthree\r\n", "--json")
    assert printed(capsys) == score_texts(TEXTS, [["one"], ["two"], ["three"]])


def test_json_lines_with_categories_make_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"references": group, "category": name}) for group, name in zip(REFERENCES, ["seen", "new", "seen"], strict=True)]
    run(tmp_path, "\n".join(TEXTS), "\n".join(lines), "--profile", "webnlg", suffix="jsonl")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    scores = score_texts(TEXTS, REFERENCES, profile="webnlg", categories=["seen", "new", "seen"])
    assert rows[0] == ["all", "seen", "new"]
    assert rows[1:] == [
        [name, f"{scores[name]:.4f}", f"{scores[f'{name}_seen']:.4f}", f"{scores[f'{name}_new']:.4f}"] for name in list(scores)[:7]
    ]


def test_json_lines_of_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "\n".join(TEXTS), "\n".join(json.dumps(group) for group in REFERENCES), "--json", suffix="jsonl")
    assert printed(capsys) == score_texts(TEXTS, REFERENCES)


def test_one_hypothesis_has_all_lines_as_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "a pub\n", "x\na pub\n")
    assert "rouge_l            100.0000\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hypotheses", "references", "suffix", "message"),
    [
        ("a\nb\nc\n", GROUPED + "\nmore\n", "txt", "hyp.txt has 3 lines, .*ref.txt references for 4; each line"),
        ("", "a\n", "txt", "hyp.txt is empty; it must hold one hypothesis per line"),
        ("a\n", "\n\n", "txt", "ref.txt is empty; it must hold references"),
        ("a\n", "", "jsonl", "ref.jsonl is empty"),
        ("a\nb\n", "x\n\n\ny\n", "txt", "ref.txt:3: an empty line without references before it"),
        ("a\n", "\nx\n", "txt", "ref.txt:1: an empty line without references"),
        (b"caf\xe9\n", "x\n", "txt", "hyp.txt: byte 4 .0xe9. is not UTF-8; name a text file in UTF-8"),
        ("a\n", "not json\n", "jsonl", "ref.jsonl:1: not JSON"),
        ("a\n", "[]\n", "jsonl", "ref.jsonl:1: has no references"),
        ("a\n", '[["a"]]\n', "jsonl", "ref.jsonl:1: must be a list of texts"),
        ("a\n", '{"texts": ["a"]}\n', "jsonl", 'ref.jsonl:1: must be .* one under "references"'),
        ("a\n", '{"references": ["a"], "category": 3}\n', "jsonl", 'ref.jsonl:1: "category" is 3; it must be a text'),
        ("a\nb\n", '{"references": ["a"], "category": "x"}\n["b"]\n', "jsonl", "1 of 2 lines have a"),
        ("a\n", '[" "]\n', "jsonl", "hypothesis 1 has no reference that is not empty"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, hypotheses: str | bytes, references: str, suffix: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(tmp_path, hypotheses, references, suffix=suffix)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "JSONL"])
def test_json_lines_are_taken_for_what_they_are_whatever_their_place(tmp_path: Path, suffix: str) -> None:
    rows = "".join(json.dumps({"text": "a b", "references": ["a b"]}) + "\n" for _ in range(2))
    run(tmp_path, "a b\na b\n", rows, suffix=suffix)
    with pytest.raises(DataError, match=r"HYPOTHESES is .*, a file of JSON; it must be text with one hypothesis per line"):
        score.main([str(tmp_path / f"ref.{suffix}"), str(tmp_path / "hyp.txt")], World())
    (tmp_path / f"ref.{suffix}").write_text("a b\nc d\n")
    with pytest.raises(DataError, match=":1: not JSON"):
        score.main([str(tmp_path / "hyp.txt"), str(tmp_path / f"ref.{suffix}")], World())


def test_other_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file"):
        score.main([str(tmp_path / "nowhere"), "x"], World())
    with pytest.raises(AdaKronError, match="a folder"):
        score.main([str(tmp_path), "x"], World())
    with pytest.raises(ConfigError, match="invalid choice: 'E2E'"):
        run(tmp_path, "a\n", "a\n", "--profile", "E2E")
    with pytest.raises(ConfigError, match="runs in one process"):
        score.main([], World(rank=0, local_rank=0, world_size=2))


@pytest.mark.launcher
def test_the_program_itself(tmp_path: Path) -> None:
    (tmp_path / "hyp.txt").write_text("a b\n")
    done = python(str(ROOT / "launch" / "score.py"), str(tmp_path / "hyp.txt"), str(tmp_path / "missing.txt"))
    assert done.returncode == 2, done.output
    assert done.stderr.startswith("error: ") and "missing.txt: cannot be read" in done.stderr
