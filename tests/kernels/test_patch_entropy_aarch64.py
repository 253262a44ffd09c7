"""The CPU kernel as a Jetson runs it: NEON, cross-compiled and executed under emulation."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def on_aarch64(compile_program: Any) -> Any:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs the packages g++-aarch64-linux-gnu and qemu-user-static")
    return compile_program(compiler, "-O3", "-static", launcher=(emulator,))


SHAPES = {
    "one cell": {"images": 1, "height": 1, "width": 1, "top_cells": 1},
    "odd everywhere": {"images": 3, "depth": 33, "height": 5, "width": 7, "prototypes": 73, "n_normal": 36},
    "a real model": {"images": 1, "depth": 256, "height": 16, "width": 16, "prototypes": 448, "n_normal": 384},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_the_definition(shape: dict[str, int], make_case: Any, on_aarch64: Any, precision: Any) -> None:
    case = make_case(**shape)
    precision.check(on_aarch64(case, "baseline"), case)


def test_decides_as_on_x86(make_case: Any, on_aarch64: Any, sanitized: Any) -> None:
    case = make_case(images=4, depth=64, height=16, width=16, prototypes=200, n_normal=150, top_cells=13)
    here, there = sanitized(case, "baseline"), on_aarch64(case, "baseline")
    np.testing.assert_allclose(there.score, here.score, rtol=1e-5)
    np.testing.assert_array_equal(there.nearest, here.nearest)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_cell_that_cannot_be_scored_never_looks_normal(value: float, make_case: Any, on_aarch64: Any) -> None:
    case = make_case()
    z = case.z.copy()
    z[1, 20, 2, 3] = value
    outputs = on_aarch64(case.but(z=z), "baseline")
    assert np.isnan(outputs.score).tolist() == [False, True]
    assert np.isnan(outputs.map).sum() == 1
