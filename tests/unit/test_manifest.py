"""Manifests: every damage to a listed file is seen, nothing outside the folder is touched, other files are nobody's promise."""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from adakron.errors import CheckpointError
from adakron.manifest import FORMAT_VERSION, MANIFEST_FILE, verify, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint-3"
    (made / "tokenizer").mkdir(parents=True)
    (made / "adapter_model.safetensors").write_bytes(random.Random(0).randbytes(300))
    (made / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (made / "empty").touch()
    write_manifest(made)
    return made


def rewrite(folder: Path, change: Any) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_text())
    change(content)
    (folder / MANIFEST_FILE).write_text(json.dumps(content))


def entry(content: bytes = b"") -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_what_was_written_is_good_and_listed(folder: Path) -> None:
    assert verify(folder) == []
    content = json.loads((folder / MANIFEST_FILE).read_text())
    assert content["format_version"] == FORMAT_VERSION
    assert content["files"] == {
        "adapter_model.safetensors": entry(random.Random(0).randbytes(300)),
        "empty": entry(),
        "tokenizer/vocab.txt": entry(b"a\nb\n"),
    }


def test_files_added_beside_do_not_make_it_bad(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer" / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    assert verify(folder) == []


def test_every_truncation_and_every_flipped_bit_is_seen(folder: Path) -> None:
    # The manifest's own bits, too. In place: a file made anew is flushed by some file systems, thousands of times here.
    for name in ("adapter_model.safetensors", "tokenizer/vocab.txt", MANIFEST_FILE):
        whole = (folder / name).read_bytes()
        with (folder / name).open("r+b", buffering=0) as file:
            for bit in range(8 * len(whole)):
                at = bit // 8
                os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << bit % 8]), at)
                assert verify(folder), f"{name} with bit {bit} flipped"
                os.pwrite(file.fileno(), whole[at : at + 1], at)
            # The newline at the end of the manifest says nothing.
            for size in reversed(range(len(whole) - (name == MANIFEST_FILE))):
                file.truncate(size)
                assert verify(folder), f"{name} of {size} bytes"
            os.pwrite(file.fileno(), whole, 0)
    assert verify(folder) == []


def test_the_reasons_are_told_apart(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 300)
    (folder / "tokenizer" / "vocab.txt").write_text("a\n")
    assert verify(folder) == [
        "adapter_model.safetensors has other content than was written (SHA-256 differs)",
        "empty is missing",
        "tokenizer/vocab.txt has 2 bytes, and was written with 4",
    ]


def test_a_folder_without_a_manifest_is_old_or_half(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    assert verify(folder) == [f"it holds no {MANIFEST_FILE}: written by an older version of this program, or half-written"]
    assert verify(folder / "none") == ["it is no folder"]


def test_a_newer_format_is_said_to_be_newer(folder: Path) -> None:
    rewrite(folder, lambda content: content.update(format_version=FORMAT_VERSION + 1))
    assert verify(folder) == [f"{MANIFEST_FILE} has format 2, and this version of the program reads 1: update it"]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"format_version": 1}',
        '{"format_version": 1, "files": {}}', '{"format_version": 1, "files": []}',
        '{"format_version": true, "files": {"empty": {"size": 0, "sha256": ""}}}', '{"format_version": 1, "files": {"empty": 3}}',
        '{"format_version": 1, "files": {"empty": {"size": 0, "sha256": "e3"}}}', '{"format_version": 0, "files": {"empty": {}}}',
    ],
    ids=range(12),
)  # fmt: skip
def test_an_invalid_manifest_is_damaged(text: str, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(text)
    (problem,) = verify(folder)
    assert problem.startswith(f"{MANIFEST_FILE} is damaged")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "", ".", "..", "tokenizer//vocab.txt", "a\0b", "a\\b"])
def test_names_that_leave_the_folder_are_refused(name: str, folder: Path) -> None:
    (folder.parent / "secret").write_text("")
    rewrite(folder, lambda content: content["files"].update({name: entry()}))
    (problem,) = verify(folder)
    assert problem.endswith("which is no file inside the folder")


def test_names_are_shown_without_control_characters(folder: Path) -> None:
    rewrite(folder, lambda content: content["files"].update({"\x1b[2Jgone": entry()}))
    assert verify(folder) == ["'\\x1b[2Jgone' is missing"]


def test_links_are_not_followed(folder: Path) -> None:
    (folder / "tokenizer").rename(folder.parent / "moved")
    (folder / "tokenizer").symlink_to(folder.parent / "moved")
    (folder / "empty").unlink()
    (folder / "empty").symlink_to("/dev/null")
    assert [problem.split(",")[0] for problem in verify(folder)] == ["empty is", "tokenizer/vocab.txt is"]
    with pytest.raises(CheckpointError, match="is a link or a device"):
        write_manifest(folder)
    (folder / MANIFEST_FILE).unlink()
    (folder / MANIFEST_FILE).symlink_to(folder / "empty")
    assert verify(folder) == [f"{MANIFEST_FILE} is not a plain file"]


def test_folders_and_pipes_in_place_of_files(folder: Path) -> None:
    for name, make in (("empty", os.mkfifo), ("adapter_model.safetensors", os.mkdir)):
        (folder / name).unlink()
        make(folder / name)
    assert verify(folder) == ["adapter_model.safetensors is not a plain file", "empty is not a plain file"]


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def failing(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "vocab.txt":
            raise OSError(5, "Input/output error")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    assert verify(folder) == ["tokenizer/vocab.txt cannot be read (Input/output error)"]


def test_a_name_that_is_no_text_is_refused_before_it_is_written(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9")).touch()
    with pytest.raises(CheckpointError, match="name is not UTF-8"):
        write_manifest(folder)


def test_an_empty_checkpoint_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no file"):
        write_manifest(tmp_path)
    assert list(tmp_path.iterdir()) == []
