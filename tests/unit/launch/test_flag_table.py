"""README's table of flags against the configuration classes."""

import dataclasses
import re

from launch.arguments import GROUPS
from tests.helpers.launch import ROOT


def test_the_table_of_flags_is_complete():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| group | flags |") :].split("\n\n")[0]
    said = {word for quoted in re.findall(r"`([a-z0-9_ ]+)`", table) for word in quoted.split()}
    fields = {field.name for group in GROUPS for field in dataclasses.fields(group) if field.init}
    assert fields <= said, fields - said
