"""The CUDA kernels, executed on the CPU under sanitizers, against the NumPy definition. No GPU takes part."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = Path(__file__).parents[2] / "kernels" / "cuda" / "patch_entropy.cu"
IMPLEMENTATIONS = ["cuda", "cuda-half"]


def representable(case: Any, implementation: str) -> Any:
    """The case with inputs that the implementation reads without rounding."""
    if implementation == "cuda":
        return case
    as_half = {name: getattr(case, name).astype(np.float16).astype(np.float32) for name in ("z", "prototypes")}
    return case.but(**as_half)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_agrees_with_the_definition_at_any_size(
    implementation: str, data: st.DataObject, make_case: Any, sanitized: Any, precision: Any
) -> None:
    height, width = data.draw(st.integers(1, 20), "height"), data.draw(st.integers(1, 20), "width")
    prototypes = data.draw(st.integers(2, 200) | st.sampled_from([511, 600]), "prototypes")
    case = make_case(
        data.draw(st.integers(0, 2**32 - 1), "seed"),
        images=data.draw(st.integers(1, 3), "images"),
        depth=data.draw(st.sampled_from([1, 3, 8, 31, 32, 65, 128]), "depth"),
        height=height,
        width=width,
        prototypes=prototypes,
        n_normal=data.draw(st.integers(1, prototypes - 1) | st.just(prototypes - 1), "n_normal"),
        top_cells=data.draw(st.integers(1, height * width), "top_cells"),
        softness=data.draw(st.sampled_from([0.0625, 0.5, 1.5, 16.0]), "softness"),
        kappa=data.draw(st.sampled_from([0.0, 0.4375, 0.875]), "kappa"),
    )
    case = representable(case, implementation)
    precision.check(sanitized(case, implementation, seed=data.draw(st.integers(0, 9), "thread order")), case)


LARGE = {
    "many prototypes": {"prototypes": 2048, "n_normal": 1500, "height": 8, "width": 8},
    "more patches than are kept": {"images": 2, "depth": 5, "height": 70, "width": 60, "top_cells": 301},
    "many patches": {"images": 1, "depth": 16, "height": 64, "width": 64, "top_cells": 205},
    "many images": {"images": 32, "depth": 24},
    "deep": {"images": 1, "depth": 1025, "height": 4, "width": 8},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_large(implementation: str, shape: dict[str, int], make_case: Any, sanitized: Any, precision: Any) -> None:
    case = representable(make_case(**shape), implementation)
    precision.check(sanitized(case, implementation), case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
def test_a_cell_that_cannot_be_scored_never_looks_normal(
    value: float, implementation: str, sanitized: Any, check_broken_cell: Any
) -> None:
    check_broken_cell(lambda case: sanitized(case, implementation), value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-40, 1e3], ids=["zeros", "half denormal", "denormal", "large"])
def test_magnitudes(scale: float, implementation: str, make_case: Any, sanitized: Any, precision: Any) -> None:
    case = make_case()
    case = representable(case.but(z=(case.z * scale).astype(np.float32), softness=max(1.5, scale)), implementation)
    precision.check(sanitized(case, implementation), case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lowest_index_wins_a_tie(implementation: str, make_case: Any, sanitized: Any) -> None:
    # More than one tile and split of prototypes holds the same rows.
    case = make_case(prototypes=600, n_normal=300)
    repeated = np.concatenate([np.tile(case.prototypes[:10], (30, 1)), np.tile(case.prototypes[10:20], (30, 1))])
    nearest = sanitized(case.but(prototypes=repeated), implementation).nearest
    assert (nearest[:, 0] < 10).all()
    assert ((nearest[:, 1] >= 300) & (nearest[:, 1] < 310)).all()


@pytest.mark.parametrize("top_cells", [1, 7, 20, 35])
def test_cells_of_equal_evidence_count_as_often_as_needed(top_cells: int, make_case: Any, sanitized: Any) -> None:
    case = make_case(height=5, width=7, top_cells=top_cells)
    z = case.z.copy()
    z[:, :, 1:4] = z[:, :, :1]  # four equal rows
    outputs = sanitized(case.but(z=z), "cuda")
    top = np.sort(outputs.map.reshape(len(outputs.map), -1).astype(np.float64), axis=1)[:, -top_cells:]
    np.testing.assert_allclose(outputs.score, top.mean(axis=1) + case.parameters.offset, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_neither_order_nor_batch_changes_a_bit(implementation: str, make_case: Any, sanitized: Any) -> None:
    case = make_case(images=3, depth=40, height=9, width=9, prototypes=300, n_normal=200)
    outputs = sanitized(case, implementation)
    for seed in range(1, 5):
        assert sanitized(case, implementation, seed=seed).tobytes() == outputs.tobytes()
    alone = sanitized(case.but(z=case.z[1:2]), implementation)
    np.testing.assert_array_equal(alone.map[0], outputs.map[1])
    np.testing.assert_array_equal(alone.score[0], outputs.score[1])


@pytest.mark.parametrize("change", [{"n_normal": 40}, {"n_normal": 0}, {"top_cells": 0}, {"top_cells": 36}], ids=str)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, int], make_case: Any, sanitized: Any) -> None:
    done = sanitized.run(make_case(height=5, width=7).but(**change), "cuda")
    assert done.returncode == 1, "cudaErrorInvalidValue"
    assert done.stdout == b""


def test_no_thread_reads_what_another_may_be_writing(cxx: str, make_case: Any, compile_program: Any) -> None:
    if shutil.which("setarch") is None:
        pytest.skip("no setarch on this machine: ThreadSanitizer needs it to switch address randomisation off")
    flags = ["-O1", "-g", "-fsanitize=thread", "-DMELIAD_ON_CPU_THREADS", "-pthread"]
    raced = compile_program(cxx, *flags, launcher=("setarch", "-R"))
    shape = {"images": 1, "prototypes": 130, "n_normal": 70, "top_cells": 5}
    for case in (make_case(depth=70, height=6, width=6, **shape), make_case(depth=64, height=5, width=8, **shape)):
        for implementation in IMPLEMENTATIONS:
            raced(case, implementation)


def test_every_barrier_is_needed_and_its_absence_is_seen(
    cxx: str, make_case: Any, compile_program: Any, tmp_path: Path
) -> None:
    """Without any one of them the outputs change for some order of the threads, so other tests would find that.

    But for the one between blocks, which run one after the other here.
    """
    shape = {"images": 1, "height": 9, "prototypes": 700, "n_normal": 560, "top_cells": 7}
    # Elements one by one, 16 bytes at a time beside the computation, and cells enough for several blocks to finish.
    cases = {
        "odd": make_case(3, depth=70, width=9, **shape),
        "aligned": make_case(3, depth=64, width=8, **shape),
        "large": make_case(3, images=1, depth=8, height=33, width=32, prototypes=20, n_normal=12, top_cells=7),
    }
    whole = compile_program(cxx, "-O1")
    expected = {(kind, name): whole.run(cases[kind], name).stdout for kind in cases for name in IMPLEMENTATIONS}

    def outputs_change(program: Any) -> bool:
        return any(
            program.run(cases[kind], name, seed=seed).stdout != output
            for (kind, name), output in expected.items()
            for seed in range(4)
        )

    source, barrier = SOURCE.read_text(), "__syncthreads();"
    for include in ("patch_entropy.hpp", "tensor_core.cuh"):
        source = source.replace(f'"{include}"', f'"{SOURCE.parent / include}"')
    pieces = source.split(barrier)
    assert len(pieces) > 8
    for number in range(1, len(pieces)):
        before, after = barrier.join(pieces[:number]), barrier.join(pieces[number:])
        if "__threadfence();" in before.splitlines()[-2]:
            continue
        file = tmp_path / "without.cu"
        file.write_text(before + ";" + after)
        line = before.count("\n") + 1
        assert outputs_change(compile_program(cxx, "-O1", cuda_source=file)), f"the barrier in line {line} does nothing"


ARCHITECTURES = ["sm_80", "sm_87", "sm_89", "sm_90", "sm_110", "compute_80"]


def test_compiles_for_every_device(tmp_path: Path) -> None:
    """Ampere, Orin, Ada, Hopper, Thor and intermediate code; registers do not spill into memory."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA kernels are compiled as C++ only")
    for architecture, source in itertools.product(ARCHITECTURES, (SOURCE, SOURCE.with_name("preprocess.cu"))):
        kind = "-cubin" if architecture.startswith("sm_") else "-ptx"
        done = subprocess.run(
            [nvcc, "-std=c++17", kind, f"-arch={architecture}", "-Xptxas=-v", source, "-o", tmp_path / "compiled"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        if kind == "-cubin":
            assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == done.stderr.count("spill stores")
