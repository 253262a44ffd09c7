"""Every command that README and the tutorial show is executed, in their order, in one folder as a reader has it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from meliad_edge.errors import RegressionError

REPOSITORY = Path(__file__).parents[2]
PROGRAM = "meliad-edge"

pytestmark = pytest.mark.workshop


def shown_blocks(page: str, language: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shown_commands() -> list[str]:
    """In the order in which a reader types them: the whole tutorial, then what only README has."""
    lines = [
        line
        for page in ("docs/tutorial.md", "README.md")
        for block in shown_blocks(page, "sh")
        for line in block.splitlines()
    ]
    return list(dict.fromkeys(line for line in lines if line.startswith(f"{PROGRAM} ")))


def write_video(pictures: list[Path], file: Path) -> None:
    size = cv2.imread(str(pictures[0])).shape[1::-1]
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), 12, size)
    for picture in pictures:
        for _ in range(6):
            writer.write(cv2.imread(str(picture)))
    writer.release()


@pytest.fixture(scope="module")
def folder(texture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages say a reader has: pictures in `parts`, a project file, and a video of the line."""
    root = tmp_path_factory.mktemp("reader")
    shutil.copytree(texture_set, root / "parts")
    (project_file,) = shown_blocks("docs/tutorial.md", "toml")
    (root / "parts.toml").write_text(project_file, encoding="utf-8")
    good, scratched = (sorted((root / "parts/test" / name).glob("*.png")) for name in ("good", "scratch"))
    write_video([good[0], scratched[0], good[1], scratched[1]], root / "line3.mp4")
    return root


@pytest.fixture(scope="module")
def outcomes(folder: Path, invoke: Callable[..., Any]) -> dict[str, Any]:
    """What each command left behind; later ones build on earlier ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {command: run_as_shown(command, invoke) for command in shown_commands()}


def run_as_shown(command: str, invoke: Callable[..., Any]) -> Any:
    """With its output in the file that the command line names, as a shell would put it there."""
    words, _, target = command.partition(" > ")
    outcome = invoke(*shlex.split(words)[1:])
    if target:
        Path(target).write_text(outcome.out, encoding="utf-8")
    return outcome


@pytest.mark.parametrize("command", shown_commands())
def test_shown_command_works(command: str, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[command]
    # Two measurements on a machine that does other things may differ.
    allowed = {0, RegressionError.exit_code} if " bench compare " in command else {0}
    assert outcome.code in allowed, outcome.err
    assert outcome.out or outcome.err


@pytest.mark.parametrize("command", [command for command in shown_commands() if command.endswith(" --json")])
def test_shown_json_can_be_read(command: str, outcomes: dict[str, Any]) -> None:
    lines = outcomes[command].out.splitlines()
    assert lines and all(isinstance(json.loads(line), dict) for line in lines)


def test_named_files_were_written(folder: Path, outcomes: dict[str, Any]) -> None:
    named = [
        shlex.split(command)[index + 1]
        for command in outcomes
        for index, word in enumerate(shlex.split(command))
        if word in ("--out", "--save", "--report")
    ]
    assert named
    for name in named:
        path = folder / name
        assert path.is_file() or any(path.iterdir()), name


def test_overlays_are_a_picture_and_a_map_each(folder: Path, outcomes: dict[str, Any]) -> None:
    overlays = list((folder / "overlays").iterdir())
    pictures = len(list((folder / "parts/test/scratch").glob("*.png")))
    assert sorted(file.suffix for file in overlays) == [".npy"] * pictures + [".png"] * pictures


def test_event_folder_is_as_described(folder: Path, outcomes: dict[str, Any]) -> None:
    records = [json.loads(line) for line in (folder / "events/events.jsonl").read_text().splitlines()]
    assert {record["state"] for record in records} >= {"new", "end"}
    assert all((folder / "events" / record["picture"]).is_file() for record in records)


def test_run_folder_and_bundle_hold_the_described_parts(
    folder: Path, outcomes: dict[str, Any], table_rows: Callable[[str, str], list[list[str]]]
) -> None:
    from zipfile import ZipFile

    page = "docs/architecture.md"
    described = {row[0] for row in table_rows(page, "| file | content |")}
    assert {file.name for file in (folder / "runs/parts").iterdir()} == described
    with ZipFile(folder / "parts.meliad") as archive:
        # The table shows the first golden frame for all of them.
        parts = {name for name in archive.namelist() if not re.fullmatch(r"golden/(?!000)\d{3}\.png", name)}
    assert parts | {"manifest.sig"} == {
        row[0] for row in table_rows(page, "| part | content |")
    }  # this one is unsigned


def test_readme_names_the_targets_of_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    lines = [line for block in shown_blocks("README.md", "sh") for line in block.splitlines()]
    targets = [line.removeprefix("make ") for line in lines if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
