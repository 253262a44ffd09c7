"""libmeliad_kernels.so through ctypes; its CUDA functions in a build that executes the kernels on the CPU."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.data.preprocess import to_model_input
from meliad_edge.models.scoring_kernel import _Batch, _declare, _Parameters
from meliad_edge.runtime.kernel_library import find_kernel_library

KERNELS = Path(__file__).parents[2] / "kernels"


class Frame(ctypes.Structure):
    _fields_ = [
        ("pixels", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width", "is_bgr", "model_height", "model_width")),
    ]


@pytest.fixture(scope="session")
def library(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("c_api") / "libmeliad_kernels.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    macros = ["-DMELIAD_WITH_CUDA", "-DMELIAD_CUDA_ON_CPU"]
    sources = [KERNELS / "c_api" / "meliad_kernels.cpp", *sorted((KERNELS / "cpu").glob("*.cpp"))]
    cuda_sources = [KERNELS / "cuda" / "patch_entropy.cu", KERNELS / "cuda" / "preprocess.cu"]
    subprocess.run([cxx, *flags, *macros, *sources, "-x", "c++", *cuda_sources, "-o", path], check=True)
    return _declare(ctypes.CDLL(str(path)))


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class Run:
    """Arrays of one run and the structures that point to them."""

    def __init__(self, case: Any, element: type = np.float32) -> None:
        images, depth, height, width = case.z.shape
        self.z, self.prototypes = case.z.astype(element), case.prototypes.astype(element)
        self.score = np.zeros(images, np.float32)
        self.map = np.zeros((images, height, width), np.float32)
        self.nearest = np.zeros((images, 2, height, width), np.int64)
        pointers = map(address, (self.z, case.direction, self.score, self.map, self.nearest))
        self.batch = _Batch(images, depth, height * width, *pointers)
        self.parameters = _Parameters(*asdict(case.parameters).values())


def test_scores_on_the_cpu(library: ctypes.CDLL, make_case: Any, precision: Any) -> None:
    case = make_case(height=20)
    run = Run(case)
    scorer = library.meliad_scorer_create(ctypes.byref(run.parameters), address(run.prototypes), *run.prototypes.shape)
    tiles = library.meliad_scorer_tile_count(scorer, ctypes.byref(run.batch))
    for first, end in ((tiles // 2, tiles), (0, tiles // 2)):  # in any order
        assert library.meliad_scorer_score_tiles(scorer, ctypes.byref(run.batch), first, end) == 0
    assert library.meliad_scorer_score_images(scorer, ctypes.byref(run.batch)) == 0
    library.meliad_scorer_destroy(scorer)
    precision.check(run, case)


def test_says_what_went_wrong(library: ctypes.CDLL, make_case: Any) -> None:
    run = Run(make_case().but(kappa=1.5))
    assert not library.meliad_scorer_create(
        ctypes.byref(run.parameters), address(run.prototypes), *run.prototypes.shape
    )
    assert library.meliad_last_error().startswith(b"PatchEntropyScore: kappa is 1.5")
    run = Run(make_case())
    scorer = library.meliad_scorer_create(ctypes.byref(run.parameters), address(run.prototypes), *run.prototypes.shape)
    run.batch.depth = 32
    assert library.meliad_scorer_score_tiles(scorer, ctypes.byref(run.batch), 0, 1) == -1
    assert library.meliad_last_error() == (
        b"PatchEntropyScore: z has shape [2, 32, 35], expected [N, 33, cells] with at least 4 cells"
    )
    run.batch.depth, run.batch.cells = 33, 3
    assert library.meliad_scorer_score_images(scorer, ctypes.byref(run.batch)) == -1
    run.batch.cells = 35
    assert library.meliad_scorer_score_tiles(scorer, ctypes.byref(run.batch), 0, 1000) == -1
    assert library.meliad_last_error().startswith(b"PatchEntropyScore: tiles [0, 1000) of ")
    library.meliad_scorer_destroy(scorer)


@pytest.mark.parametrize("element", [np.float32, np.float16])
def test_scores_as_on_cuda(element: type, library: ctypes.CDLL, make_case: Any, precision: Any) -> None:
    case = make_case(depth=40)
    rounded = {name: getattr(case, name).astype(element).astype(np.float32) for name in ("z", "prototypes")}
    case = case.but(**rounded)
    run = Run(case, element)
    workspace = np.zeros(library.meliad_cuda_workspace_bytes(run.batch.images, run.batch.cells), np.uint8)
    error = library.meliad_cuda_score_patches(
        ctypes.byref(run.parameters), address(run.prototypes), len(run.prototypes), int(element is np.float16),
        ctypes.byref(run.batch), address(workspace), None,
    )  # fmt: skip
    assert error == 0
    precision.check(run, case)


def test_preprocesses_as_on_cuda(library: ctypes.CDLL) -> None:
    bgr = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    frame = Frame(address(bgr), bgr.strides[0], 120, 200, 1, 48, 64)
    expected = to_model_input(np.ascontiguousarray(bgr[..., ::-1]), (48, 64))
    image = np.zeros((48, 64, 3), np.uint8)
    assert library.meliad_cuda_preprocess_bytes(ctypes.byref(frame), ctypes.c_void_p(address(image)), None) == 0
    assert np.abs(image.astype(int) - expected).max() <= 1
    mean, deviation = (ctypes.c_float * 3)(0.5, 0.4, 0.3), (ctypes.c_float * 3)(0.2, 0.3, 0.4)
    normalised = (image / 255.0 - np.array(mean)) / np.array(deviation)
    for half, element, tolerance in ((0, np.float32, 1e-5), (1, np.float16, 1e-2)):
        planes = np.zeros((3, 48, 64), element)
        target = ctypes.c_void_p(address(planes))
        assert library.meliad_cuda_preprocess_planes(ctypes.byref(frame), mean, deviation, half, target, None) == 0
        np.testing.assert_allclose(planes, np.moveaxis(normalised, -1, 0), atol=tolerance)
    frame.pitch = 1
    assert library.meliad_cuda_preprocess_bytes(ctypes.byref(frame), ctypes.c_void_p(address(image)), None) == 1
    assert library.meliad_last_error().startswith(b"CUDA: ")


@pytest.mark.gpu
def test_preprocesses_on_a_gpu() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch lends the device memory")
    path = find_kernel_library("c")
    if path is None or not torch.cuda.is_available():
        pytest.skip("no CUDA device, or no kernels built for it")
    installed = ctypes.CDLL(str(path))
    for height, width in ((720, 1280), (480, 640), (481, 641)):
        bgr = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels = torch.from_numpy(bgr).cuda()
        image = torch.zeros((256, 256, 3), dtype=torch.uint8, device="cuda")
        frame = Frame(pixels.data_ptr(), 3 * width, height, width, 1, 256, 256)
        assert installed.meliad_cuda_preprocess_bytes(ctypes.byref(frame), ctypes.c_void_p(image.data_ptr()), None) == 0
        expected = to_model_input(np.ascontiguousarray(bgr[..., ::-1]), (256, 256))
        assert np.abs(image.cpu().numpy().astype(int) - expected).max() <= 1
