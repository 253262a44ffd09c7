from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from meliad_edge import errors

PAGE = "docs/architecture.md"

TableRows = Callable[[str, str], list[list[str]]]


def test_every_module_has_its_row(table_rows: TableRows, repository: Path) -> None:
    described = {name.strip(" /,") for row in table_rows(PAGE, "| module |") for name in row[0].split()}
    package = repository / "meliad_edge"
    linked_or_data = {"export", "benchmarks", "templates", "_kernels", "__pycache__"}
    modules = {f"meliad_edge/{file.name}" for file in package.glob("*.py") if file.stem != "__init__"}
    modules |= {f"meliad_edge/{file.name}" for file in package.iterdir() if file.is_dir()} - {
        f"meliad_edge/{name}" for name in linked_or_data
    }
    assert described == modules


def test_exit_codes_are_those_of_the_exceptions(table_rows: TableRows) -> None:
    described = {(row[1], int(row[0])) for row in table_rows(PAGE, "| code |") if row[1]}
    defined = {
        (name, error.exit_code)
        for name, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.MeliadError)
    }
    assert described == defined


@pytest.mark.workshop
def test_signatures_are_those_of_the_operators(pages: dict[str, str]) -> None:
    from meliad_edge.export import even_light_function, scoring_function
    from meliad_edge.export.scoring_function import DOMAIN, DOMAIN_VERSION
    from meliad_edge.models.scoring import ScoringParameters

    attributes = {}
    for operator, function in (
        (scoring_function.OPERATOR, scoring_function.scoring_function()),
        (even_light_function.OPERATOR, even_light_function.even_light_function()),
    ):
        _, found, text = pages[PAGE].partition(f"{DOMAIN}::{operator}, version {DOMAIN_VERSION}\n")
        assert found, operator
        described = re.findall(r"(\w+) (ints?|floats?)\b", text.partition("\nattributes: ")[2].partition("\n")[0])
        inputs = re.findall(r"(\w+) (?:float32|uint8) \[", text.partition("=>")[0])
        outputs = re.findall(r"(\w+) (?:float32|int64) \[", text.partition("    => (")[2].partition("\n")[0])
        assert inputs == list(function.input)
        assert outputs == list(function.output)
        assert sorted(name for name, _ in described) == sorted(function.attribute)
        attributes[operator] = described
    assert attributes[scoring_function.OPERATOR] == [
        (field.name, str(field.type)) for field in fields(ScoringParameters)
    ]


@pytest.mark.workshop
def test_stated_onnx_versions_are_those_of_the_export(pages: dict[str, str]) -> None:
    from meliad_edge.export.graph import IR_VERSION, OPSET

    assert f"ONNX opset {OPSET}, FP32, IR version {IR_VERSION}," in pages[PAGE]


@pytest.mark.workshop
def test_graph_is_as_described(table_rows: TableRows, bundle_file: Path) -> None:
    import onnxruntime

    from meliad_edge.bundle import open_bundle

    session = onnxruntime.InferenceSession(open_bundle(bundle_file).models["fp32"], providers=["CPUExecutionProvider"])
    described = [(row[0], row[1], row[2].split()[0]) for row in table_rows(PAGE, "| | name | type and shape |")]
    types = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(int64)": "int64"}
    assert described == [
        *(("input", value.name, types[value.type]) for value in session.get_inputs()),
        *(("output", value.name, types[value.type]) for value in session.get_outputs()),
    ]
