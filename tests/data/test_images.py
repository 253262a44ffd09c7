from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from meliad_edge.data import images
from meliad_edge.data.images import decode_image, find_images, read_image, read_mask
from meliad_edge.errors import DataError, ImageError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def seen_by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def assert_same_colours(data: bytes, tolerance: int = 0) -> None:
    ours = decode_image(data, "image")
    expected = seen_by_pillow(data)
    assert ours.dtype == np.uint8
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected).max() <= tolerance


# ---- what is accepted


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (7, 1), (1, 5)])
def test_formats_agree_with_pillow(picture: np.ndarray, file_format: str, mode: str, size: tuple[int, int]) -> None:
    assert_same_colours(encode(Image.fromarray(picture).resize(size).convert(mode), file_format))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["P", "1"])
def test_palette_and_one_bit(picture: np.ndarray, file_format: str, mode: str) -> None:
    assert_same_colours(encode(Image.fromarray(picture).convert(mode), file_format))


def test_palette_with_a_transparent_colour_keeps_its_colours(picture: np.ndarray) -> None:
    assert_same_colours(encode(Image.fromarray(picture).convert("P"), "PNG", transparency=3))


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_transparency_is_dropped_not_blended(picture: np.ndarray, file_format: str, options: dict[str, Any]) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, picture.shape[:2], dtype=np.uint8)
    data = encode(Image.fromarray(np.dstack([picture, alpha])), file_format, **options)
    np.testing.assert_array_equal(decode_image(data, "image"), picture)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_variants(picture: np.ndarray, progressive: bool) -> None:
    assert_same_colours(encode(Image.fromarray(picture), "JPEG", quality=90, progressive=progressive))


def cmyk(picture: np.ndarray) -> Image.Image:
    inks = np.dstack([255 - picture, np.tile(np.linspace(0, 120, 64, dtype=np.uint8), (48, 1))])
    return Image.frombytes("CMYK", (64, 48), inks.tobytes())


def test_cmyk_jpeg_has_the_colours_pillow_sees(picture: np.ndarray) -> None:
    data = encode(cmyk(picture), "JPEG", quality=100)
    assert b"Adobe" in data  # Adobe's inverted inks; read the wrong way round the picture is a negative
    assert_same_colours(data, tolerance=2)


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
def test_cmyk_tiff_has_the_colours_pillow_sees(picture: np.ndarray, options: dict[str, Any]) -> None:
    assert_same_colours(encode(cmyk(picture), "TIFF", **options), tolerance=2)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture: np.ndarray, file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(picture), file_format, exif=exif)
    height, width = decode_image(data, "image").shape[:2]
    assert (height, width) == ((48, 64) if orientation <= 4 else (64, 48))
    assert_same_colours(data)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_scale_linearly_over_the_full_range(suffix: str, channels: int) -> None:
    values = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    _, data = cv2.imencode(suffix, np.dstack([values] * channels))
    expected = np.rint(values / 257)
    decoded = decode_image(data.tobytes(), "image")
    assert np.abs(decoded - expected[..., None]).max() == 0
    assert (decoded.min(), decoded.max()) == (0, 255)


def test_sixteen_bits_are_not_stretched_per_image() -> None:
    _, data = cv2.imencode(".png", np.full((4, 4), 4095, np.uint16))
    assert decode_image(data.tobytes(), "image").max() == 16


def test_bmp_stored_from_the_top(picture: np.ndarray) -> None:
    _, data = cv2.imencode(".bmp", np.ascontiguousarray(picture[::-1, :, ::-1]))
    from_top = bytearray(data.tobytes())
    from_top[22:26] = struct.pack("<i", -48)
    np.testing.assert_array_equal(decode_image(bytes(from_top), "image"), picture)


@pytest.mark.parametrize("file_format", FORMATS)
def test_bytes_after_the_image_do_no_harm(picture: np.ndarray, file_format: str) -> None:
    data = encode(Image.fromarray(picture), file_format)
    np.testing.assert_array_equal(decode_image(data + bytes(100), "image"), decode_image(data, "image"))


def test_read_image_goes_by_content_not_by_suffix(tmp_path: Path, picture: np.ndarray) -> None:
    path = tmp_path / "really-a-png.jpg"
    path.write_bytes(encode(Image.fromarray(picture), "PNG"))
    np.testing.assert_array_equal(read_image(path), picture)


# ---- what is refused


def test_missing_file(tmp_path: Path, refuses: Any) -> None:
    with refuses(ImageError, "nothing.png: it does not exist"):
        read_image(tmp_path / "nothing.png")


def test_folder(tmp_path: Path, refuses: Any) -> None:
    with refuses(ImageError, "it is a folder"):
        read_image(tmp_path)


def test_pipe_does_not_hang(tmp_path: Path, refuses: Any) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with refuses(ImageError, "a device or a pipe"):
        read_image(tmp_path / "pipe.png")


def test_path_through_a_file(tmp_path: Path, refuses: Any) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with refuses(ImageError, "Not a directory"):
        read_image(tmp_path / "file" / "image.png")


def test_huge_file_is_not_read(tmp_path: Path, refuses: Any) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(2_000_000_000)  # sparse
    with refuses(ImageError, "2,000,000,000 bytes"):
        read_image(path)


def test_zero_bytes(tmp_path: Path, refuses: Any) -> None:
    (tmp_path / "empty.png").touch()
    with refuses(ImageError, "0 bytes"):
        read_image(tmp_path / "empty.png")


@pytest.mark.parametrize("data", [b"hello, world", b"BM, the text file", b"\x00", b"GIF89a" + bytes(50)])
def test_not_an_image(data: bytes, refuses: Any) -> None:
    with refuses(ImageError, "which is no PNG, JPEG, BMP, TIFF or WebP file"):
        decode_image(data, "notes.png")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"progressive": True, "lossless": True, "compression": "tiff_lzw"}])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_truncated(picture: np.ndarray, file_format: str, options: dict[str, Any], kept: float, refuses: Any) -> None:
    data = encode(Image.fromarray(picture), file_format, **options)
    with refuses(ImageError, "it is cut short or damaged"):
        decode_image(data[: max(int(len(data) * kept), 20)], "cut")


def test_jpeg_without_its_last_marker_is_truncated_despite_a_whole_thumbnail(picture: np.ndarray, refuses: Any) -> None:
    thumbnail = encode(Image.fromarray(picture).resize((16, 12)), "JPEG")
    data = encode(Image.fromarray(picture), "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert decode_image(data, "whole").shape == (48, 64, 3)
    with refuses(ImageError, "ends before its end-of-image marker"):
        decode_image(data[:-2], "cut")


def test_tiff_with_its_directory_in_front_is_checked_for_its_strips(refuses: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8).tobytes()
    entries = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 8 + 2 + 12 * 8 + 4), (277, 1), (279, 16)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries)
    data = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + pixels
    assert decode_image(data, "whole")[..., 0].tobytes() == pixels
    with refuses(ImageError, "has 121 of 126 bytes"):
        decode_image(data[:-5], "cut")


def test_png_with_a_flipped_bit(picture: np.ndarray, refuses: Any, capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(encode(Image.fromarray(picture), "PNG"))
    data[len(data) // 2] ^= 1
    with refuses(ImageError, "wrong checksum in its IDAT chunk"):
        decode_image(bytes(data), "flipped")
    assert capfd.readouterr().err == ""


def patched(data: bytes, file_format: str, width: int, height: int) -> bytes:
    """The same file with a header that lies about its size."""
    out = bytearray(data)
    if file_format == "PNG":
        out[16:24] = struct.pack(">II", width, height)
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    elif file_format == "JPEG":
        start = data.index(b"\xff\xc0")
        out[start + 5 : start + 9] = struct.pack(">HH", height, width)
    elif file_format == "BMP":
        out[18:26] = struct.pack("<ii", width, height)
    elif file_format == "TIFF":
        (directory,) = struct.unpack_from("<I", data, 4)
        for tag, value in ((256, width), (257, height)):
            entry = data.index(struct.pack("<HH", tag, 4), directory)
            out[entry + 8 : entry + 12] = struct.pack("<I", value)
    else:
        out[26:30] = struct.pack("<HH", width, height)
    return bytes(out)


@pytest.mark.parametrize("file_format", FORMATS)
def test_giant_image_is_refused_from_its_header(picture: np.ndarray, file_format: str, refuses: Any) -> None:
    # 268 megapixels claimed by a file of a few kilobytes: refused as too large, not as damaged, so nothing was decoded.
    data = patched(encode(Image.fromarray(picture), file_format), file_format, 16383, 16383)
    with refuses(ImageError, "is 16383x16383 pixels, at most 100 megapixels"):
        decode_image(data, "giant")


def test_giant_lossless_webp_and_long_png(picture: np.ndarray, refuses: Any) -> None:
    lossless = bytearray(encode(Image.fromarray(picture), "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    with refuses(ImageError, "is 16384x16384 pixels"):
        decode_image(bytes(lossless), "giant")
    with refuses(ImageError, "1000001x1 pixels"):
        decode_image(encode(Image.new("L", (1_000_001, 1)), "PNG"), "long")


def test_exactly_the_limit_is_accepted(monkeypatch: pytest.MonkeyPatch, picture: np.ndarray, refuses: Any) -> None:
    data = encode(Image.fromarray(picture), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64)
    decode_image(data, "image")
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64 - 1)
    with refuses(ImageError, "64x48 pixels"):
        decode_image(data, "image")


def test_what_only_opencv_notices_becomes_an_image_error_and_no_log_line(
    picture: np.ndarray, refuses: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    # The whole file is there, but its header asks for more than the pixel data gives.
    data = patched(encode(Image.fromarray(picture), "TIFF"), "TIFF", 600_000, 100)
    with refuses(ImageError, "save it again as PNG"):
        decode_image(data, "wide.tiff")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int16, np.int8])
@pytest.mark.parametrize("channels", [1, 3])
def test_float_and_signed_samples(dtype: type, channels: int, refuses: Any) -> None:
    _, data = cv2.imencode(".tiff", np.ones((8, 8, channels), dtype))
    with refuses(ImageError, f"{'float' if np.issubdtype(dtype, np.floating) else 'signed'} {dtype(0).nbytes * 8}-bit"):
        decode_image(data.tobytes(), "depth.tiff")


@pytest.mark.parametrize("file_format", ["TIFF", "WEBP", "PNG"])
def test_several_pages_or_frames(picture: np.ndarray, file_format: str, refuses: Any) -> None:
    more = [Image.fromarray(255 - picture)]
    with refuses(ImageError, "holds several pages or frames"):
        decode_image(encode(Image.fromarray(picture), file_format, save_all=True, append_images=more), "pages")


def test_bad_files_leave_standard_error_clean(picture: np.ndarray, capfd: pytest.CaptureFixture[str]) -> None:
    for file_format in FORMATS:
        data = encode(Image.fromarray(picture), file_format)
        for cut in range(1, len(data) - 1, max(len(data) // 40, 1)):
            with pytest.raises(ImageError):
                decode_image(data[:cut], "cut")
    assert capfd.readouterr().err == ""


def test_a_chunk_whose_name_is_damaged_is_named_in_one_line() -> None:
    encoded = bytearray(encode(Image.fromarray(np.zeros((9, 11, 3), np.uint8)), "PNG"))
    encoded[13] = ord("\n")
    with pytest.raises(ImageError) as caught:
        decode_image(bytes(encoded), "damaged")
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_an_image_error(data: st.DataObject) -> None:
    file_format = data.draw(st.sampled_from(FORMATS))
    noise = np.random.default_rng(3).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    encoded = bytearray(encode(Image.fromarray(noise), file_format))
    for position in data.draw(st.lists(st.integers(0, len(encoded) - 1), max_size=4)):
        encoded[position] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 1_000_000)  # keep lying headers cheap
        try:
            decoded = decode_image(bytes(encoded), "fuzzed")
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert decoded.dtype == np.uint8
            assert decoded.ndim == 3
            assert decoded.shape[2] == 3


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP", b"BM", b""]),
    st.binary(max_size=200),
)
def test_random_bytes_behind_a_signature_are_refused(signature: bytes, rest: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(signature + rest, "random")


# ---- masks


def write_mask(path: Path, mask: np.ndarray) -> Path:
    Image.fromarray(mask).save(path)
    return path


@pytest.fixture
def marked() -> np.ndarray:
    marked = np.zeros((6, 9), bool)
    marked[2:4, 3:8] = True
    return marked


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 1), (127, 128), (0, 200)])
def test_mask_values(tmp_path: Path, marked: np.ndarray, low: int, high: int) -> None:
    path = write_mask(tmp_path / "mask.png", np.where(marked, high, low).astype(np.uint8))
    np.testing.assert_array_equal(read_mask(path, (6, 9)), marked)


@pytest.mark.parametrize("high", [1, 255, 65535])
def test_sixteen_bit_masks_are_not_scaled(tmp_path: Path, marked: np.ndarray, high: int) -> None:
    path = write_mask(tmp_path / "mask.png", np.where(marked, high, 0).astype(np.uint16))
    np.testing.assert_array_equal(read_mask(path, (6, 9)), marked)


def test_one_bit_and_palette_masks(tmp_path: Path, marked: np.ndarray) -> None:
    Image.fromarray(marked).save(tmp_path / "one-bit.png")
    palette = Image.fromarray(marked.astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    for name in ("one-bit.png", "palette.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name, (6, 9)), marked)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (35, 164, 54)])
def test_coloured_masks_count_by_their_strongest_channel(
    tmp_path: Path, marked: np.ndarray, colour: tuple[int, int, int]
) -> None:
    path = write_mask(tmp_path / "mask.png", (marked[..., None] * np.array(colour)).astype(np.uint8))
    np.testing.assert_array_equal(read_mask(path, (6, 9)), marked)


def test_transparent_paint_is_no_defect_but_an_unused_fourth_byte_is_ignored(
    tmp_path: Path, marked: np.ndarray
) -> None:
    paint = np.full((6, 9, 3), 200, np.uint8)
    path = write_mask(tmp_path / "painted.png", np.dstack([paint, np.where(marked, 255, 0).astype(np.uint8)]))
    np.testing.assert_array_equal(read_mask(path, (6, 9)), marked)
    grey = np.where(marked, 255, 0).astype(np.uint8)
    path = write_mask(tmp_path / "unused.png", np.dstack([grey, grey, grey, np.zeros_like(grey)]))
    np.testing.assert_array_equal(read_mask(path, (6, 9)), marked)


def test_an_empty_mask_is_empty(tmp_path: Path) -> None:
    assert not read_mask(write_mask(tmp_path / "mask.png", np.zeros((6, 9), np.uint8)), (6, 9)).any()


def test_mask_of_another_size(tmp_path: Path, marked: np.ndarray, refuses: Any) -> None:
    path = write_mask(tmp_path / "mask.png", marked.astype(np.uint8))
    with refuses(DataError, "is 9x6 pixels, its image 64x48"):
        read_mask(path, (48, 64))
    with refuses(DataError, "is 9x6 pixels, its image 6x9"):
        read_mask(path, (9, 6))


def test_missing_and_broken_masks(tmp_path: Path, refuses: Any) -> None:
    with refuses(ImageError, "does not exist"):
        read_mask(tmp_path / "mask.png", (6, 9))
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with refuses(ImageError, "ends inside its header"):
        read_mask(tmp_path / "mask.png", (6, 9))


# ---- finding images


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_a_folder_that_is_removed_meanwhile_is_left_out(make_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_files("1.png", "day/2.png", "night/3.png")
    real_path = os.path.realpath

    def remove_a_folder(path: str) -> str:
        if path == str(root):
            shutil.rmtree(root / "day")
        return real_path(path)

    monkeypatch.setattr(os.path, "realpath", remove_a_folder)
    assert names(find_images(str(root)), root) == ["1.png", "night/3.png"]


def test_a_folder_that_cannot_be_listed_is_refused(make_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_files("1.png", "day/2.png")
    scan = os.scandir

    def refuse(path: str) -> Any:
        if path == str(root / "day"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot list folder .*day: Permission denied"):
        find_images(str(root))


def test_find_in_a_folder_is_recursive_sorted_and_skips_what_is_hidden(make_files: Any) -> None:
    root = make_files("b/2.PNG", "b/1.jpg", "a.webp", "c-1/x.tiff", ".hidden.png", ".git/1.png", "b/.thumbs/1.png")
    (root / "b" / "notes.txt").write_text("no image")
    assert names(find_images(str(root)), root) == ["a.webp", "b/1.jpg", "b/2.PNG", "c-1/x.tiff"]


def test_find_one_file_takes_it_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "frame.raw").touch()
    assert find_images(str(tmp_path / "frame.raw")) == [tmp_path / "frame.raw"]


def test_find_by_glob(make_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_files("cam1/2.png", "cam1/1.png", "cam2/day/3.jpg", "other/4.png", "cam1/.5.png")
    (root / "cam1" / "log.txt").touch()
    assert names(find_images(f"{root}/cam*/*"), root) == ["cam1/1.png", "cam1/2.png"]
    assert names(find_images(f"{root}/cam[12]/**/*"), root) == ["cam1/1.png", "cam1/2.png", "cam2/day/3.jpg"]
    monkeypatch.chdir(root)
    assert find_images("*/?.png") == [Path("cam1/1.png"), Path("cam1/2.png"), Path("other/4.png")]


def test_find_a_file_whose_name_looks_like_a_glob(make_files: Any) -> None:
    root = make_files("part[1].png")
    assert find_images(str(root / "part[1].png")) == [root / "part[1].png"]


def test_find_refuses_what_is_not_there(tmp_path: Path, refuses: Any) -> None:
    with refuses(DataError, "nowhere does not exist"):
        find_images(str(tmp_path / "nowhere"))
    with refuses(DataError, "no images in"):
        find_images(str(tmp_path))
    with refuses(DataError, "no images in"):
        find_images(str(tmp_path / "*.png"))


def test_links_are_followed_but_loops_end(make_files: Any) -> None:
    root = make_files("set/a/1.png", "elsewhere/2.png")
    (root / "set" / "a" / "up").symlink_to(root / "set")
    (root / "set" / "a" / "self").symlink_to(root / "set" / "a")
    (root / "set" / "linked").symlink_to(root / "elsewhere")
    assert names(find_images(str(root / "set")), root) == ["set/a/1.png", "set/linked/2.png"]
    assert names(find_images(f"{root}/set/**/1.png"), root) == ["set/a/1.png"]


def test_a_dangling_link_is_listed_so_that_it_is_reported(make_files: Any, refuses: Any) -> None:
    root = make_files("1.png")
    (root / "2.png").symlink_to(root / "gone.png")
    assert names(find_images(str(root)), root) == ["1.png", "2.png"]
    with refuses(ImageError, "2.png: it does not exist"):
        read_image(root / "2.png")
