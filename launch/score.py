"""Score generated texts: `python launch/score.py HYPOTHESES REFERENCES [--profile e2e] [--json]`. docs/scores.md.

HYPOTHESES: one text per line; an empty line is an empty text.
REFERENCES: in the layout of the E2E metrics, the references of one hypothesis on lines of their own and an empty line between two
hypotheses' (without any empty line: one reference per hypothesis); or *.jsonl, a line per hypothesis, each a list of texts or
{"references": [...], "category": "..."}, where the category may be left out of all.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import json
from collections.abc import Sequence

from adakron.errors import DataError
from adakron.launcher import World
from adakron.scores import score_texts
from adakron.scores.profiles import PROFILES
from adakron.untrusted import UnreadableError, parse_json, read_text
from launch.arguments import Parser
from launch.program import execute, refuse_launcher

References = list[list[str]]

_JSON = (".jsonl", ".json")


def main(arguments: Sequence[str], world: World) -> None:
    """Print the scores, one per line with a column for each category, or as JSON."""
    refuse_launcher(world)
    options = _parser().parse(arguments)
    if Path(options.hypotheses).suffix.lower() in _JSON:
        raise DataError(
            f"HYPOTHESES is {options.hypotheses}, a file of JSON; it must be text with one hypothesis per line, such as the"
            " <name>.hypotheses.txt of launch/generate.py (and REFERENCES comes second)"
        )
    hypotheses = _lines(options.hypotheses)
    if not hypotheses:
        raise DataError(f"{options.hypotheses} is empty; it must hold one hypothesis per line")
    references, categories = read_references(options.references, len(hypotheses))
    if len(references) != len(hypotheses):
        raise DataError(
            f"{options.hypotheses} has {len(hypotheses):,} lines, {options.references} references for {len(references):,}; each line of the"
            " first needs its references in the second, in the same order"
        )
    scores = score_texts(hypotheses, references, profile=options.profile, categories=categories, wordnet=options.wordnet)
    if options.json:
        print(json.dumps({"profile": options.profile, "texts": len(hypotheses), "scores": scores}, indent=2))
    else:
        print(_table(scores, list(dict.fromkeys(categories or ()))))


def _parser() -> Parser:
    parser = Parser((), __doc__ or "")
    parser.add_argument("hypotheses", metavar="HYPOTHESES", help="File of generated texts.")
    parser.add_argument("references", metavar="REFERENCES", help="File of references.")
    parser.add_argument("--profile", default="plain", choices=list(PROFILES), help="Tokenisation and forms of scores. Default: plain.")
    parser.add_argument("--wordnet", metavar="FOLDER", help="nltk data folder with WordNet, for METEOR. Default: NLTK_DATA's.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser


def read_references(path: str, hypotheses: int) -> tuple[References, list[str] | None]:
    """The references of each hypothesis, and its category where the file has them. Raises DataError.

    hypotheses: how many there are; of one hypothesis all lines of a file without empty lines are references.
    """
    lines = _lines(path)
    if Path(path).suffix.lower() in _JSON:
        return _from_objects(path, lines)
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{path} is empty; it must hold references")
    if all(line.strip() for line in lines):
        return ([lines] if hypotheses == 1 else [[line] for line in lines]), None
    groups: References = [[]]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
        else:
            raise DataError(f"{path}:{number}: an empty line without references before it; one empty line must separate two hypotheses'")
    return groups, None


def _from_objects(path: str, lines: list[str]) -> tuple[References, list[str] | None]:
    references: References = []
    categories: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line)
        except UnreadableError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); each line must be a list of references, or an object") from error
        group = entry.get("references") if isinstance(entry, dict) else entry
        if group == []:
            raise DataError(
                f"{path}:{number}: has no references; a text is scored against one or more (generate from a split that has them)"
            )
        if not isinstance(group, list) or not all(isinstance(text, str) for text in group):
            raise DataError(f'{path}:{number}: must be a list of texts, or an object with one under "references"')
        references.append(group)
        category = entry.get("category") if isinstance(entry, dict) else None
        if category is not None and not isinstance(category, str):
            raise DataError(f'{path}:{number}: "category" is {category!r:.40}; it must be a text')
        categories += [] if category is None else [category]
    if not references:
        raise DataError(f"{path} is empty; it must hold references")
    if categories and len(categories) != len(references):
        raise DataError(f'{path}: {len(categories):,} of {len(references):,} lines have a "category"; give it in all, or in none')
    return references, categories or None


def _lines(path: str) -> list[str]:
    """The lines of a text file, as few as newlines make them: what else Unicode calls a line's end may stand in a text."""
    try:
        text = read_text(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a text file") from error
    except UnreadableError as error:
        raise DataError(f"{path}: {error}; name a text file in UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if not lines[-1] else lines


def _table(scores: dict[str, float], categories: Sequence[str]) -> str:
    names = list(scores)[: len(scores) // (1 + len(categories))]  # those of all texts come first
    rows = [["", "all", *categories]] if categories else []
    for name in names:
        values = [scores[name], *(scores[f"{name}_{category}"] for category in categories)]
        rows.append([name, *(f"{value:.4f}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


if __name__ == "__main__":
    execute(main)
