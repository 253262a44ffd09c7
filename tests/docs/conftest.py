from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

TableRows = Callable[[str, str], list[list[str]]]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def pages() -> dict[str, str]:
    """Every page by its path in the repository."""
    files = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return {file.relative_to(REPOSITORY).as_posix(): file.read_text(encoding="utf-8") for file in files}


@pytest.fixture(scope="session")
def table_rows(pages: dict[str, str]) -> TableRows:
    """The cells of the one table in a page whose first line begins with a text, backticks removed."""

    def rows(page: str, first_line: str) -> list[list[str]]:
        lines = pages[page].splitlines()
        starts = [index for index, line in enumerate(lines) if line.startswith(first_line)]
        assert len(starts) == 1, f"{page} has {len(starts)} tables {first_line!r}"
        found = []
        for line in lines[starts[0] + 2 :]:
            if not line.startswith("|"):
                break
            found.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
        return found

    return rows
