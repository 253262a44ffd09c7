"""The C++ definition and the CPU kernel in every instruction set, under sanitizers, against the NumPy definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SHAPES = {
    "one cell": {"images": 1, "height": 1, "width": 1, "top_cells": 1},
    "one channel": {"depth": 1},
    "less than a tile": {"height": 3, "width": 1, "top_cells": 3},
    "a tile and one": {"height": 33, "width": 1},
    "one anomaly prototype": {"n_normal": 39},
    "one normal prototype": {"n_normal": 1},
    "panels and one": {"prototypes": 73, "n_normal": 36},
    "many": {"images": 3, "depth": 65, "height": 16, "width": 16, "prototypes": 130, "n_normal": 97},
}


@pytest.mark.parametrize("softness", [1.5, 1e-3], ids=["soft", "hard"])  # screening pays where it is small
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("implementation", ["baseline", "avx2", "avx512", "vnni", "amx", "cuda", "reference"])
def test_agrees_with_the_definition(
    implementation: str, shape: dict[str, int], softness: float, make_case: Any, sanitized: Any, precision: Any
) -> None:
    case = make_case(**shape, softness=softness)
    outputs = sanitized(case, implementation)
    if outputs is None:
        pytest.skip(f"this processor has no {implementation}")
    precision.check(outputs, case)


@pytest.mark.parametrize("implementation", ["baseline", "avx2", "avx512", "vnni", "amx", "cuda", "reference"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_cell_that_cannot_be_scored_never_looks_normal(
    value: float, implementation: str, make_case: Any, sanitized: Any, reference: Any
) -> None:
    case = make_case()
    z = case.z.copy()
    z[1, 20, 2, 3] = value
    case = case.but(z=z)
    outputs, exact = sanitized(case, implementation), reference(case)
    if outputs is None:
        pytest.skip(f"this processor has no {implementation}")
    assert np.isnan(exact.map).sum() == 1
    np.testing.assert_allclose(outputs.map, exact.map, atol=1e-4)
    np.testing.assert_allclose(outputs.score, exact.score, atol=1e-4)
    np.testing.assert_array_equal(outputs.nearest, exact.nearest)


def test_the_environment_can_ask_for_less(make_case: Any, sanitized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MELIAD_EDGE_INSTRUCTION_SET", "baseline")
    assert sanitized.run(make_case(), "baseline").stderr == b"baseline"
    assert sanitized.run(make_case(), "avx2").returncode == 3, "not to be had"
