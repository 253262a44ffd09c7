"""The commands of the page about Triton, in their order, with a server of its protocol."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAGE = "docs/triton.md"

pytestmark = pytest.mark.workshop


@pytest.fixture(scope="module")
def folder(
    texture_set: Path, run_folder: Path, triton_stand_in: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the tutorial left."""
    root = tmp_path_factory.mktemp("triton-reader")
    shutil.copytree(texture_set, root / "parts")
    shutil.copytree(run_folder, root / "runs/parts")
    return root


@pytest.fixture(scope="module")
def outcomes(
    pages: dict[str, str], folder: Path, triton_stand_in: ModuleType, invoke: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    """What each command left behind; the server is started where the first one asks for it."""
    blocks = re.findall(r"^```sh\n(.*?)^```", pages[PAGE], re.MULTILINE | re.DOTALL)
    server = None
    outcomes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (line for block in blocks for line in block.splitlines()):
            if "--triton" in command and server is None:
                server = triton_stand_in.Server(folder / "models")
            here = command if server is None else command.replace("localhost:8001", f"localhost:{server.port}")
            outcomes[command] = invoke(*shlex.split(here)[1:])
    yield outcomes
    if server is not None:
        server.stop()


def test_shown_commands_work(outcomes: dict[str, Any]) -> None:
    assert len(outcomes) == 4
    for command, outcome in outcomes.items():
        assert command.startswith("meliad-edge ")
        assert outcome.code == 0, outcome.err
    (predicted,) = (outcome for command, outcome in outcomes.items() if " predict " in command)
    assert predicted.out.count("ANOMALY") > 0


def test_the_repository_holds_the_described_files(
    folder: Path, outcomes: dict[str, Any], table_rows: Callable[[str, str], list[list[str]]]
) -> None:
    written = {path.relative_to(folder).as_posix() for path in (folder / "models").rglob("*") if path.is_file()}
    assert written == {row[0] for row in table_rows(PAGE, "| file | content |")}


def test_the_script_is_where_the_page_calls_it(folder: Path, outcomes: dict[str, Any], pages: dict[str, str]) -> None:
    (script,) = re.findall(r"^    sh (\S+) ", pages[PAGE], re.MULTILINE)
    assert (folder / script).is_file()
    option = "--backend-config=tensorrt,version-compatible=true"
    assert option in pages[PAGE]
    assert option in (folder / script).read_text(encoding="utf-8")


def test_stated_numbers_are_those_of_the_code(pages: dict[str, str]) -> None:
    from meliad_edge.export.triton_repository import MAX_BATCH
    from meliad_edge.runtime.triton_engine import TIMEOUT_S

    words = {8: "eight"}
    assert f"Batches hold {words[MAX_BATCH]} frames at most" in pages[PAGE]
    assert f"silent for {TIMEOUT_S:g} s" in pages[PAGE]
