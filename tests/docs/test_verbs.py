from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from meliad_edge.cli import app

VERBS = [command.name for command in app.registered_commands]
GROUPS = [group.name for group in app.registered_groups]
# Offered for every verb, so the table does not repeat them.
EVERYWHERE = {"--help"}


def offered_options(help_text: str) -> set[str]:
    return set(re.findall(r"^ +(--[a-z-]+)", help_text, re.MULTILINE)) - EVERYWHERE


@pytest.fixture(scope="module")
def table(table_rows: Callable[[str, str], list[list[str]]]) -> dict[str, set[str]]:
    return {verb: set(options.split()) for verb, _, options in table_rows("README.md", "| verb |")}


def test_table_lists_the_verbs_in_the_order_of_help(table: dict[str, set[str]], invoke: Callable[..., Any]) -> None:
    commands = invoke("--help").out.partition("Commands:")[2]
    assert re.findall(r"^  ([a-z]+)  ", commands, re.MULTILINE) == list(table)


@pytest.mark.parametrize("verb", VERBS)
def test_table_lists_the_options_of_help(verb: str, table: dict[str, set[str]], invoke: Callable[..., Any]) -> None:
    assert table[verb] == offered_options(invoke(verb, "--help").out)


def test_pages_name_no_option_that_does_not_exist(table: dict[str, set[str]], pages: dict[str, str]) -> None:
    allowed = set().union(*table.values()) | EVERYWHERE | {"--debug"}
    used = {
        option
        for page in ("README.md", "docs/tutorial.md", "docs/architecture.md", "docs/method.md")
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", pages[page])
    }
    assert used <= allowed


def test_pages_name_no_verb_that_does_not_exist(pages: dict[str, str]) -> None:
    used = {verb for text in pages.values() for verb in re.findall(r"(?:^|`)meliad-edge ([a-z]+)", text, re.MULTILINE)}
    assert used and used <= {*VERBS, *GROUPS}
