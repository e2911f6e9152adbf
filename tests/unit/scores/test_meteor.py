"""METEOR's synonyms: found where the user says, never downloaded."""

from pathlib import Path

import nltk
import pytest

from adakron.errors import DataError
from adakron.scores import score_texts

HYPOTHESES, REFERENCES = ["a pub nearby"], [["a bar nearby"]]
VERSION = "  1 WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.  \n"


@pytest.fixture(autouse=True)
def nltk_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setattr(nltk.data, "path", [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A WordNet of one synset, in Princeton's file format (its manual pages wndb and lexnames)."""
    place = tmp_path / "corpora" / "wordnet"
    place.mkdir(parents=True)
    (place / "data.adj").write_text(VERSION)
    (place / "data.noun").write_text(f"{VERSION}{len(VERSION):08d} 00 n 02 pub 0 bar 0 000 | a place for drinks  \n")
    (place / "index.noun").write_text("".join(f"{word} n 1 0 1 0 {len(VERSION):08d}  \n" for word in ("bar", "pub")))
    (place / "lexnames").write_text("00\tnoun.Tops\t1\n")
    for part in ("index.sense", "index.adj", "data.verb", "index.verb", "data.adv", "index.adv", "cntlist.rev"):
        (place / part).write_text("")
    for part in ("noun", "verb", "adv", "adj"):
        (place / f"{part}.exc").write_text("")
    return tmp_path


def test_synonyms_count_where_wordnet_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = score_texts(HYPOTHESES, REFERENCES)
    # 2 of 3 words match, in two chunks: P = R = 2/3, penalty .5 * (2/2)^3.
    assert without["meteor_exact_stem"] == pytest.approx(100 * 2 / 3 * 0.5)
    given = score_texts(HYPOTHESES, REFERENCES, wordnet=folder)
    # All 3 match in one chunk: 1 - .5 * (1/3)^3. The name says which METEOR it is.
    assert given["meteor"] == pytest.approx(100 * (1 - 0.5 / 27))
    assert "meteor_exact_stem" not in given
    monkeypatch.setenv("NLTK_DATA", f"{folder / 'missing'}:{folder}")
    assert score_texts(HYPOTHESES, REFERENCES) == given


def test_a_folder_without_wordnet_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"empty has no corpora/wordnet or corpora/wordnet\.zip; name a folder"):
        score_texts(HYPOTHESES, REFERENCES, wordnet=tmp_path / "empty")
    (folder / "corpora" / "wordnet" / "lexnames").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        score_texts(HYPOTHESES, REFERENCES, wordnet=folder)
