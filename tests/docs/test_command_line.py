"""The page about ``qnext`` has every command, and its tables are those of the commands."""

from __future__ import annotations

import re

import pytest

from qnext_plugins.cli.app import COMMANDS
from tests.docs.command_tables import BLOCKS, PAGE, commands, with_tables

TEXT = PAGE.read_text()


def test_every_command_has_its_section_and_its_table() -> None:
    assert re.findall(r"^## qnext (\w+)$", TEXT, re.M) == list(COMMANDS)
    groups = [name for name in commands() if " " in name]
    assert re.findall(r"^### qnext (\w+ \w+)$", TEXT, re.M) == groups
    assert [block["name"] for block in BLOCKS.finditer(TEXT)] == list(commands())


def test_tables_are_up_to_date() -> None:
    assert with_tables(TEXT) == TEXT, "python -m tests.docs.command_tables writes them"


@pytest.mark.parametrize("name", list(commands()))
def test_every_option_in_a_sections_text_is_one_of_the_command(name: str) -> None:
    (section,) = re.findall(rf"^##+ qnext {name}$\n(.*?)(?=^##+ qnext|\Z)", BLOCKS.sub("", TEXT), re.M | re.S)
    parameters = commands()[name].params
    options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    # Flags of the engines stand inside the quotes of a side.
    own = re.sub(r"'[^']*'", "", section)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", own)) <= options | {"--help"}
