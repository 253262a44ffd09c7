"""What other programs may rely on: names, exit codes, verbs, the version."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import meliad_edge
from meliad_edge import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
VERBS = [
    "demo", "fit", "evaluate", "calibrate", "export", "build", "check", "threshold", "predict",
    "score", "watch", "feedback",
    "flash", "rollback", "status", "logs", "doctor",
]  # fmt: skip
GROUPS = ["bench", "keys"]
REPORTING = [verb for verb in VERBS if verb != "demo"]


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert meliad_edge.__version__ == project["version"]


def test_the_installed_version_is_that_of_the_code() -> None:
    try:
        installed = importlib.metadata.version("meliad-edge")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("meliad-edge is not installed; it runs from the checkout")
    assert installed == meliad_edge.__version__


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    drawn = re.findall(r"^ {4}([│├└─ ]*)(\w+Error) +(\d+) ", errors.__doc__ or "", re.MULTILINE)
    parents: list[str] = []
    for branch, name, code in drawn:
        depth = len(branch) // 4
        error = getattr(errors, name)
        assert error.exit_code == int(code), name
        expected = "Exception" if depth == 0 else parents[depth - 1]
        assert error.__base__.__name__ == expected, name
        parents[depth:] = [name]
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert {name for _, name, _ in drawn} == classes


def test_a_missing_extra_names_the_command() -> None:
    error = errors.MissingExtraError("torch", "train")
    assert str(error) == "torch is not installed; run: pip install 'meliad-edge[train]'"


def test_the_verbs_in_the_order_of_the_line(invoke: Any) -> None:
    outcome = invoke("--help")
    assert outcome.code == 0
    commands = outcome.out.partition("Commands:")[2]
    assert re.findall(r"^  (\w+) ", commands, re.MULTILINE) == [*VERBS, *GROUPS]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(invoke: Any, verb: str) -> None:
    outcome = invoke(verb, "--help")
    assert outcome.code == 0
    assert ("--json" in outcome.out) is (verb in REPORTING)


def test_the_version_and_a_wrong_verb(invoke: Any) -> None:
    assert invoke("--version").out == f"meliad-edge {meliad_edge.__version__}\n"
    assert invoke("polish").code == 2
    assert invoke("fit", "--polish").code == 2


def test_debug_shows_the_traceback_anywhere_on_the_line(invoke: Any) -> None:
    for arguments in (("--debug", "predict", "none.meliad", "x.png"), ("predict", "none.meliad", "x.png", "--debug")):
        outcome = invoke(*arguments)
        assert outcome.code == 5
        assert "Traceback" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("meliad-edge: none.meliad: no such bundle")
