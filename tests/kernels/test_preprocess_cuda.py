"""The preprocessing kernel, executed on the CPU under sanitizers, against its definition and the product's resize."""

from __future__ import annotations

import os
import runpy
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meliad_edge.data.preprocess import to_model_input

ROOT = Path(__file__).parents[2]
definition = SimpleNamespace(**runpy.run_path(str(ROOT / "kernels" / "reference" / "preprocess.py")))

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CANARY = 0xA5
TYPES = {"bytes": np.uint8, "float": np.float32, "half": np.float16}

# (height, width) of the frame and of the model.
SIZES = [
    ((720, 1280), (256, 256)),  # averages, then area weights on both axes
    ((480, 640), (256, 256)),  # averages, then smaller and larger
    ((1080, 1920), (256, 320)),
    ((768, 1366), (256, 384)),
    ((481, 641), (256, 256)),  # odd: area weights alone
    ((768, 1024), (224, 224)),  # area weights with ties
    ((512, 512), (256, 256)),  # averages alone
    ((96, 160), (96, 160)),  # nothing to do
    ((100, 900), (256, 200)),  # area weights on one axis, larger on the other
    ((900, 100), (256, 200)),
    ((100, 75), (256, 256)),
    ((1, 1), (5, 7)),
    ((5, 7), (1, 1)),
    ((1, 1), (1, 1)),
]


def random_frame(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photograph(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Soft shapes, an edge that clips and the noise of a sensor."""
    random = np.random.default_rng(seed)
    soft = random.uniform(20, 200, (max(2, height // 24), max(2, width // 24), 3))
    soft = cv2.resize(soft, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, 3)
    soft[:, width // 3 : width // 2] += 80
    return np.clip(soft + random.normal(0, 3, soft.shape), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Kernel:
    program: Path
    launcher: tuple[str, ...] = ()

    def __call__(
        self,
        frame: NDArray[np.uint8],
        model_hw: tuple[int, int],
        output: str = "bytes",
        *,
        padding: int = 0,
        offset: int = 0,
        bgr: bool = False,
        seed: int = 0,
    ) -> NDArray[Any]:
        """The image, after a look at its neighbours in the batch."""
        height, width = frame.shape[:2]
        rows = np.random.default_rng(1).integers(0, 256, (height, 3 * width + padding), dtype=np.uint8)
        rows[:, : 3 * width] = frame.reshape(height, -1)
        header = self.header((height, width), model_hw, 3 * width + padding, offset, bgr)
        message = header + bytes(offset) + rows.tobytes()[: rows.size - padding]
        done = self.run(output, message, seed)
        assert done.returncode == 0, done.stderr.decode()
        before, image, after = np.split(np.frombuffer(done.stdout, TYPES[output]), 3)
        assert set(before.tobytes() + after.tobytes()) == {CANARY}
        return image.reshape(*model_hw, 3) if output == "bytes" else image.reshape(3, *model_hw)

    @staticmethod
    def header(
        frame_hw: tuple[int, int],
        model_hw: tuple[int, int],
        pitch: int = 0,
        offset: int = 0,
        bgr: bool = False,
        deviation: tuple[float, float, float] = DEVIATION,
    ) -> bytes:
        return struct.pack("=4iq2i6f", *frame_hw, *model_hw, pitch, offset, bgr, *MEAN, *deviation)

    def run(self, output: str, message: bytes, seed: int = 0) -> subprocess.CompletedProcess[bytes]:
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "MELIAD_ON_CPU_SEED": str(seed)}
        return subprocess.run(
            [*self.launcher, self.program, output], input=message, capture_output=True, env=environment
        )

    def plan(self, frame_hw: tuple[int, int], model_hw: tuple[int, int]) -> tuple[int, ...]:
        done = self.run("plan", self.header(frame_hw, model_hw))
        assert done.returncode == 0, done.stderr.decode()
        return struct.unpack("=9i", done.stdout)


SOURCE = ROOT / "kernels" / "cuda" / "preprocess.cu"


@pytest.fixture(scope="session")
def compile_kernel(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Kernel]:
    """Compiles preprocess_run.cpp, warnings being errors."""

    def compile_kernel(*flags: str, source: Path = SOURCE, launcher: tuple[str, ...] = ()) -> Kernel:
        program = tmp_path_factory.mktemp("preprocess") / "preprocess_run"
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        sources = [ROOT / "tests" / "kernels" / "preprocess_run.cpp", "-x", "c++", source]
        subprocess.run(
            [cxx, "-std=c++17", "-DMELIAD_CUDA_ON_CPU", *warnings, *flags, *sources, "-o", program], check=True
        )
        return Kernel(program, launcher)

    return compile_kernel


@pytest.fixture(scope="session")
def kernel(compile_kernel: Callable[..., Kernel]) -> Kernel:
    """Compiled with the address and undefined-behaviour sanitizers."""
    return compile_kernel("-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def check_against_the_definition(image: NDArray[np.uint8], frame: NDArray[np.uint8]) -> None:
    """Half a grey level of rounding; after bilinear interpolation what its integers cut off comes on top."""
    model_hw = (image.shape[0], image.shape[1])
    plan = definition.plan_resize(frame.shape[:2], model_hw)
    error = image - definition.resize(frame, model_hw)
    bilinear = plan.reduced_hw != plan.model_hw
    # Weights are off by 2^-12, which moves a value by 255 / 4096 per axis; two products lose a quarter each.
    darker, lighter = (0.5 + 0.5 + 0.13, 0.5 + 0.13) if bilinear else (0.5 + 1e-4, 0.5 + 1e-4)
    assert -darker <= error.min()
    assert error.max() <= lighter


def grey_levels_off(image: NDArray[np.uint8], frame: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.abs(image.astype(int) - to_model_input(frame, (image.shape[0], image.shape[1])))


@pytest.mark.parametrize("make_frame", [random_frame, photograph])
@pytest.mark.parametrize(("frame_hw", "model_hw"), SIZES)
def test_agrees_with_the_definition_and_with_the_product(
    frame_hw: tuple[int, int], model_hw: tuple[int, int], make_frame: Callable[..., NDArray[np.uint8]], kernel: Kernel
) -> None:
    frame = make_frame(*frame_hw)
    image = kernel(frame, model_hw)
    check_against_the_definition(image, frame)
    off = grey_levels_off(image, frame)
    # Measured with OpenCV 4.10 and 5.0 on x86: 0.02 % at 1024 x 768 to 224 x 224, 0.001 % at 641 x 481, 0 elsewhere.
    assert off.max() <= 1
    assert (off != 0).mean() <= 0.0005


sides = st.integers(1, 12) | st.integers(1, 150) | st.sampled_from([64, 96, 128, 144, 192, 256])
model_sides = st.integers(1, 9) | st.integers(1, 80)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frame_hw=st.tuples(sides, sides),
    model_hw=st.tuples(model_sides, model_sides),
    padding=st.integers(0, 9),
    offset=st.integers(0, 4),
    bgr=st.booleans(),
    output=st.sampled_from(list(TYPES)),
    seed=st.integers(0, 1000),
)
def test_any_size_layout_and_output(
    kernel: Kernel,
    frame_hw: tuple[int, int],
    model_hw: tuple[int, int],
    padding: int,
    offset: int,
    bgr: bool,
    output: str,
    seed: int,
) -> None:
    frame = random_frame(*frame_hw, seed=seed)
    as_stored = frame[..., ::-1] if bgr else frame
    image = kernel(as_stored, model_hw, padding=padding, offset=offset, bgr=bgr)
    assert grey_levels_off(image, frame).max() <= 1
    check_against_the_definition(image, frame)
    if output != "bytes":
        planes = kernel(as_stored, model_hw, output, padding=padding, offset=offset, bgr=bgr)
        check_normalised(planes, image)


def check_normalised(planes: NDArray[Any], image: NDArray[np.uint8]) -> None:
    exact = definition.normalise(image, MEAN, DEVIATION)
    rounding = 2.0**-11 * np.abs(exact) if planes.dtype == np.float16 else 0
    assert (np.abs(planes - exact) <= rounding + 1e-6).all()


@pytest.mark.parametrize("output", ["float", "half"])
def test_planes_are_the_normalised_bytes(output: str, kernel: Kernel) -> None:
    frame = photograph(270, 480)
    planes = kernel(frame, (96, 112), output)
    check_normalised(planes, kernel(frame, (96, 112)))
    assert planes.std() > 0.5


def test_half_planes_are_the_rounded_float_planes(kernel: Kernel) -> None:
    frame = random_frame(91, 200)
    half, single = kernel(frame, (33, 70), "half"), kernel(frame, (33, 70), "float")
    np.testing.assert_array_equal(half, single.astype(np.float16))


@pytest.mark.parametrize("grey", [0, 1, 127, 128, 254, 255])
@pytest.mark.parametrize(
    ("frame_hw", "model_hw"),
    [((72, 128), (25, 25)), ((61, 47), (20, 90)), ((64, 64), (32, 32)), ((1, 7), (3, 2)), ((270, 480), (64, 96))],
)
def test_a_constant_stays_what_it_is(
    frame_hw: tuple[int, int], model_hw: tuple[int, int], grey: int, kernel: Kernel
) -> None:
    frame = np.full((*frame_hw, 3), grey, np.uint8) // np.array([1, 2, 3], np.uint8)
    assert (kernel(frame, model_hw) == frame[0, 0]).all()


def test_every_barrier_is_needed_and_its_absence_is_seen(
    kernel: Kernel, compile_kernel: Callable[..., Kernel], tmp_path: Path
) -> None:
    frames = [random_frame(33, 20), random_frame(90, 160)]
    expected = [kernel(frame, (64, 64)) for frame in frames]
    source, barrier = (
        SOURCE.read_text().replace('"preprocess.hpp"', f'"{SOURCE.parent / "preprocess.hpp"}"'),
        "__syncthreads();",
    )
    pieces = source.split(barrier)
    assert len(pieces) == 3

    def outputs_change(without: Kernel, frame: NDArray[np.uint8], whole: NDArray[Any], seed: int) -> bool:
        try:
            return bool((without(frame, (64, 64), seed=seed) != whole).any())
        except AssertionError:  # it crashed, or wrote elsewhere
            return True

    for number in range(1, len(pieces)):
        file = tmp_path / "without.cu"
        file.write_text(barrier.join(pieces[:number]) + ";" + barrier.join(pieces[number:]))
        without = compile_kernel("-O1", source=file)
        pairs = list(zip(frames, expected, strict=True))
        changed = any(outputs_change(without, frame, whole, seed) for seed in range(4) for frame, whole in pairs)
        assert changed, f"barrier {number} does nothing"


def test_no_thread_reads_what_another_may_be_writing(compile_kernel: Callable[..., Kernel]) -> None:
    if shutil.which("setarch") is None:
        pytest.skip("no setarch on this machine: ThreadSanitizer needs it to switch address randomisation off")
    flags = ["-O1", "-g", "-fsanitize=thread", "-DMELIAD_ON_CPU_THREADS", "-pthread"]
    raced = compile_kernel(*flags, launcher=("setarch", "-R"))
    raced(random_frame(90, 160), (64, 64))
    raced(random_frame(33, 20), (40, 24), "half")


@pytest.mark.parametrize(("frame_hw", "model_hw"), [((90, 160), (64, 64)), ((91, 161), (40, 70)), ((33, 20), (64, 64))])
def test_the_order_of_the_threads_does_not_matter(
    frame_hw: tuple[int, int], model_hw: tuple[int, int], kernel: Kernel
) -> None:
    frame = random_frame(*frame_hw)
    images = [kernel(frame, model_hw, "float", seed=seed).tobytes() for seed in range(4)]
    assert images == images[:1] * 4


@pytest.mark.parametrize("width", [64, 66, 67])
def test_the_width_of_the_words_that_are_read_does_not_matter(width: int, kernel: Kernel) -> None:
    frame = random_frame(64, width)
    images = [kernel(frame, (16, 16), padding=padding, offset=offset) for padding in range(4) for offset in range(4)]
    assert all((image == images[0]).all() for image in images)


@pytest.mark.parametrize(
    ("frame_hw", "model_hw", "factor", "reduced_hw"),
    [
        ((720, 1280), (256, 256), 2, (256, 256)),
        ((480, 640), (256, 256), 2, (240, 320)),
        ((1080, 1920), (256, 320), 4, (270, 480)),
        ((1944, 2592), (256, 256), 8, (243, 324)),
        ((100, 900), (256, 200), 1, (100, 200)),
        ((256, 256), (256, 256), 1, (256, 256)),
        ((18, 18), (10, 10), 2, (9, 9)),  # nine tenths are enough
        ((16, 16), (9, 9), 1, (16, 16)),  # less is not
        ((2048, 2048), (1, 1), 2048, (1, 1)),
    ],
)
def test_plan(
    frame_hw: tuple[int, int], model_hw: tuple[int, int], factor: int, reduced_hw: tuple[int, int], kernel: Kernel
) -> None:
    averaged = (frame_hw[0] // factor, frame_hw[1] // factor)
    assert kernel.plan(frame_hw, model_hw) == (*frame_hw, factor, *averaged, *reduced_hw, *model_hw)


wide_sides = st.integers(1, 4096) | st.sampled_from([480, 640, 720, 1080, 1280, 1920, 2160, 3840])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frame_hw=st.tuples(wide_sides, wide_sides), model_hw=st.tuples(st.integers(1, 640), st.integers(1, 640)))
def test_plan_is_that_of_the_definition(kernel: Kernel, frame_hw: tuple[int, int], model_hw: tuple[int, int]) -> None:
    plan = definition.plan_resize(frame_hw, model_hw)
    expected = (*frame_hw, plan.factor, *plan.averaged_hw, *plan.reduced_hw, *plan.model_hw)
    assert kernel.plan(frame_hw, model_hw) == expected


@pytest.mark.parametrize(
    ("frame_hw", "model_hw"),
    [((0, 4), (4, 4)), ((4, -1), (4, 4)), ((4, 4), (4, 0)), ((1, 32768), (1, 1)), ((4096, 4096), (1, 1))],
)
def test_impossible_sizes_have_no_plan(frame_hw: tuple[int, int], model_hw: tuple[int, int], kernel: Kernel) -> None:
    assert kernel.plan(frame_hw, model_hw) == (0,) * 9


@pytest.mark.parametrize(
    ("width", "pitch", "deviation"),
    [(32768, 3 * 32768, DEVIATION), (8, 23, DEVIATION), (8, 24, (0.2, 0.0, 0.2))],
    ids=["impossible plan", "pitch shorter than a row", "deviation of 0"],
)
def test_invalid_values_are_refused_and_nothing_is_written(
    width: int, pitch: int, deviation: tuple[float, float, float], kernel: Kernel
) -> None:
    header = kernel.header((2, width), (3, 3), pitch, deviation=deviation)
    done = kernel.run("float", header + bytes(pitch + 3 * width))
    assert done.returncode == 3
    assert set(done.stdout) == {CANARY}


def test_a_tie_of_area_weights_goes_to_the_even_level(kernel: Kernel) -> None:
    frame = random_frame(11 * 15, 24)  # averages over 15 x 2 pixels, one in 30 of them a tie
    exact = frame.reshape(11, 15, 12, 2, 3).sum(axis=(1, 3)) / 30
    assert (exact % 1 == 0.5).sum() > 0
    np.testing.assert_array_equal(kernel(frame, (11, 12)), np.rint(exact))


@pytest.mark.parametrize(("frame_hw", "model_hw"), [((2, 32767), (3, 5)), ((2, 40), (1, 32767)), ((2, 40), (3, 32767))])
def test_the_longest_sides_do_not_overflow(
    frame_hw: tuple[int, int], model_hw: tuple[int, int], kernel: Kernel
) -> None:
    frame = random_frame(*frame_hw)
    check_against_the_definition(kernel(frame, model_hw), frame)


# --- the definition itself


@pytest.mark.parametrize("make_frame", [random_frame, photograph])
@pytest.mark.parametrize(("frame_hw", "model_hw"), SIZES)
def test_the_definition_is_the_product_up_to_a_grey_level(
    frame_hw: tuple[int, int], model_hw: tuple[int, int], make_frame: Callable[..., NDArray[np.uint8]]
) -> None:
    frame = make_frame(*frame_hw)
    product = to_model_input(frame, model_hw).astype(int)
    exact = definition.resize(frame, model_hw)
    assert np.abs(np.rint(exact) - product).max() <= 1
    assert abs((product - exact).mean()) <= 0.5 if product.size < 1000 else 0.13


def test_weights_worked_out_by_hand() -> None:
    np.testing.assert_allclose(definition.area_weights(5, 2), [[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]])
    np.testing.assert_allclose(definition.area_weights(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(definition.bilinear_weights(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(definition.bilinear_weights(3, 2), [[0.75, 0.25, 0], [0, 0.25, 0.75]])
