from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from meliad_edge.benchmarks import roofline

PAGE = Path(__file__).parents[2] / "kernels" / "ROOFLINE.md"


def test_page_is_what_the_compiler_says_today() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    version = roofline.compiler_version()
    if f"as nvcc {version} compiles" not in PAGE.read_text():
        pytest.skip(f"the page is of another compiler than {version}")
    usages = roofline.compiler_report()
    assert not any(usage.spilled_bytes for usage in usages)
    assert PAGE.read_text() == roofline.to_markdown(usages), "make the page again with the command it names"


def test_occupancy_is_what_fits() -> None:
    of = roofline.Usage("k", "sm_87", threads=128, registers=128, shared_bytes=28416, spilled_bytes=0)
    assert of.blocks == 4, "65,536 registers, 128 of them for each of 128 threads"
    assert of.occupancy == pytest.approx(16 / 48)
    of = roofline.Usage("k", "sm_89", threads=128, registers=32, shared_bytes=40704, spilled_bytes=0)
    assert of.blocks == 2, "100 KiB of shared memory"


def test_work_of_one_image() -> None:
    work = roofline.cost(256, 4)
    assert work.flop == 2 * 256 * 640 * 432
    assert work.memory_bytes == 4 * 432 * (256 + 640) + 4 * 432 + 256 * 20 + 4
    assert roofline.cost(512, 4).flop == 2 * work.flop


def test_shapes_are_those_of_the_kernels() -> None:
    source = roofline.SOURCES["patch_entropy"].read_text()
    for name, value in {
        "kPrototypes": roofline.PROTOTYPES // roofline._TILES,
        "kSplits": roofline.PROTOTYPES * 4 // 5 // 64,  # each tile of the larger class has a block of its own
        "kThreads": roofline._THREADS["summarise"],
        "kFinishThreads": roofline._THREADS["finish"],
    }.items():
        assert re.search(rf"\b{name} = {value}\b", source), name
    for element, element_bytes in (("float", 4), ("Half", 2)):
        cells = roofline._TILE_CELLS[element_bytes]
        assert re.search(rf"Tiling<{element}> {{\s+static constexpr int kCells = {cells}\b", source), element
