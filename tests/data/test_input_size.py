from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from meliad_edge.data.images import read_image, read_image_size
from meliad_edge.data.input_size import BASE_AREA, common_aspect_ratio, in_words, largest_size
from meliad_edge.errors import ImageError

SQUARE = (256, 256)
Sizes = list[tuple[int, int]]


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        ((300, 300), SQUARE),  # ELPV
        ((431, 431), SQUARE),
        ((432, 432), (352, 352)),  # 1.5 x 352 x 352 pixels
        ((1000, 1000), (352, 352)),
        ((64, 64), SQUARE),
        ((480, 640), (320, 416)),
        ((1920, 1080), (512, 288)),
        ((4096, 256), (1024, 64)),
        ((100, 16000), (64, 1024)),
    ],
)
def test_largest_size_of_images_of_one_size(image_size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert largest_size([image_size] * 7, 2.0) == expected


def test_budget_is_an_area() -> None:
    large = [(3000, 3000)] * 3
    assert largest_size(large, 1.0) == largest_size(large, 1.99) == SQUARE
    assert largest_size(large, 4.0) == (512, 512)


def test_images_of_different_shapes_get_a_square() -> None:
    widths = range(103, 619, 5)
    mixed = [(300, width) for width in widths]
    assert common_aspect_ratio(mixed) is None
    assert largest_size(mixed, 2.0) == SQUARE
    assert largest_size([(480, 640), (640, 480)] * 4, 2.0) == (352, 352)


def test_one_image_in_twenty_does_not_decide() -> None:
    sizes = [(480, 640)] * 19
    assert common_aspect_ratio([*sizes, (640, 480)]) == pytest.approx(0.75)
    assert largest_size([*sizes, (640, 480)], 2.0) == largest_size(sizes, 2.0)


@pytest.mark.parametrize(("spread", "agrees"), [(0.09, True), (0.11, False)])
def test_agreement_is_within_a_tenth_of_the_median(spread: float, agrees: bool) -> None:
    heights = [1000 * (1 + spread * side) for side in (-1, -1, 0, 0, 0, 1, 1)]
    assert (common_aspect_ratio([(round(height), 1000) for height in heights]) is not None) == agrees


def test_without_a_readable_image() -> None:
    assert common_aspect_ratio([]) is None
    assert largest_size([], 16.0) == SQUARE


sides = st.integers(1, 20_000)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=30), st.floats(1.0, 16.0))
def test_what_holds_for_all_images(image_sizes: Sizes, budget: float) -> None:
    height, width = largest_size(image_sizes, budget)
    assert (height, width) == largest_size(image_sizes[::-1], budget)
    native = np.median([height * width for height, width in image_sizes])
    assert height % 32 == width % 32 == 0
    assert 64 <= min(height, width) <= max(height, width) <= 1024
    doublings = round(np.log2(height * width / BASE_AREA))
    assert height * width == pytest.approx(2**doublings * BASE_AREA, rel=0.3)
    assert doublings >= 0
    assert 2**doublings <= budget
    assert doublings == 0 or native >= 1.5 * height * width
    ratio = common_aspect_ratio(image_sizes) or 1.0
    if 1 / 16 <= ratio <= 16:
        # Half a step of the shorter side, and of the longer one.
        assert abs(np.log(height / width / ratio)) < 0.3


def test_words_have_the_width_first() -> None:
    assert in_words((320, 416)) == "416 x 320"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_size_is_that_of_the_decoded_picture(
    picture: NDArray[np.uint8], tmp_path: Path, file_format: str, orientation: int | None
) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, file_format, exif=exif)
    file = tmp_path / "picture"
    file.write_bytes(buffer.getvalue())
    assert read_image_size(file) == read_image(file).shape[:2]


def test_damaged_orientation_is_no_orientation(picture: NDArray[np.uint8], tmp_path: Path) -> None:
    file = tmp_path / "picture.jpg"
    Image.fromarray(picture).save(file, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read_image_size(file) == (48, 64)


def test_size_needs_no_pixel(picture: NDArray[np.uint8], tmp_path: Path) -> None:
    """The compressed pixels of a JPEG are overwritten; its header and its end marker stay."""
    file = tmp_path / "picture.jpg"
    assert cv2.imwrite(str(file), picture)
    data = file.read_bytes()
    scan = data.index(b"\xff\xda") + 2
    file.write_bytes(data[: scan + 2] + bytes(len(data) - scan - 4) + data[-2:])
    assert read_image_size(file) == (48, 64)


def test_size_of_what_is_no_image(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"nothing")
    with pytest.raises(ImageError, match="which is no PNG"):
        read_image_size(file)
