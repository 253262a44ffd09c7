"""Image and mask files to arrays, and a path, folder or glob to a list of image files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.data.image_header import ImageHeader, read_image_header
from meliad_edge.errors import DataError, ImageError

if TYPE_CHECKING:
    from cv2.typing import MatLike

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 100_000_000

# libpng's own limit; it writes its complaint straight to standard error, so such files must not reach it.
_MAX_SIDE = 1_000_000
# More than MAX_PIXELS of four 16-bit channels, uncompressed.
_MAX_FILE_BYTES = 1_000_000_000
_SUPPORTED_BITS = (1, 2, 4, 8, 16)
_GLOB_CHARACTERS = frozenset("*?[")

# Whatever OpenCV logs about a bad file is raised here as an ImageError. It has one log level per process, and the
# function that sets it moved in OpenCV 5. Level 0 is silence.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read one image file as it would be seen on a screen; :func:`decode_image` says what is accepted.

    Args:
        path: A PNG, JPEG, BMP, TIFF or WebP file.

    Returns:
        RGB, uint8 [H, W, 3].

    Raises:
        ImageError: The file is missing, a folder, empty, no image, damaged, of a kind that is not
            supported, or has more than 100 megapixels.
    """
    return decode_image(_read_file(path), str(path))


def decode_image(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode one image that is already in memory.

    Grey, palette and CMYK become RGB, EXIF orientation is applied (OpenCV 4.8 overlooks that of WebP
    files), transparency is dropped. 16-bit samples are divided by 257, so that 0..65535 becomes 0..255
    for every image alike: stretching each image to its own range would hide differences in brightness.
    A camera that fills only the lower 12 bits therefore gives dark images. Colour profiles are not
    applied.

    Args:
        data: The whole encoded file: PNG, JPEG, BMP, TIFF or WebP, one page.
        name: What to call it in an error.

    Returns:
        RGB, uint8 [H, W, 3].

    Raises:
        ImageError: As for :func:`read_image`. The size is refused from the header, before decoding.
    """
    # IMREAD_COLOR drops the alpha channel: what lies under transparent pixels is what the camera recorded, while
    # blending would put in a background that no camera saw. (For 8-bit TIFF libtiff has blended with black already.)
    pixels = _decode(data, name, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def read_image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of what :func:`read_image` gives, without decoding a pixel.

    Raises:
        ImageError: The file cannot be read, or its header already says that it is not supported.
    """
    header = _checked_header(_read_file(path), str(path))
    return (header.width, header.height) if header.is_turned else (header.height, header.width)


def highest_deep_sample(path: Path) -> int | None:
    """The highest sample of a file with 16-bit ones, 0 to 65,535; None of a file with fewer bits.

    Raises:
        ImageError: As for :func:`read_image`.
    """
    data = _read_file(path)
    if _checked_header(data, str(path)).sample_bits < 16:
        return None
    return int(_decode(data, str(path), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH).max())


def read_mask(path: Path, shape_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Read a ground-truth mask.

    A pixel is defective when its strongest colour channel is above 127, or above 0 in a mask that holds
    nothing above 1, and it is not transparent. EXIF orientation is not applied to masks.

    Args:
        path: The mask file, in any format that :func:`read_image` takes.
        shape_hw: Height and width of its image in pixels.

    Returns:
        bool [H, W], True where defective.

    Raises:
        ImageError: The file cannot be read.
        DataError: The mask has another size than its image; it is never resized.
    """
    pixels = _decode(_read_file(path), str(path), cv2.IMREAD_UNCHANGED)
    if pixels.shape[:2] != shape_hw:
        mask_size, image_size = (f"{width}x{height}" for height, width in (pixels.shape[:2], shape_hw))
        raise DataError(f"mask {path} is {mask_size} pixels, its image {image_size}; export it at the image's size")
    if pixels.ndim == 2:
        level = pixels
    else:
        # Not luminance: painted in pure red or blue a defect would fall below the threshold.
        level = pixels[..., :3].max(axis=2)
        if pixels.shape[2] == 4:
            is_transparent = pixels[..., 3] <= (32767 if pixels.dtype == np.uint16 else 127)
            # Some writers leave an unused fourth byte at zero everywhere; that is no transparency.
            if not is_transparent.all():
                level = np.where(is_transparent, 0, level)
    return np.asarray(level > (127 if level.max() > 1 else 0), dtype=np.bool_)


def find_images(path_or_glob: str) -> list[Path]:
    """List the images that one argument of a command stands for.

    Args:
        path_or_glob: A file (taken whatever its suffix), a folder (searched with its subfolders), or a
            glob pattern such as ``cam*/**/*.png``. Hidden files and folders are skipped.

    Returns:
        Files sorted by POSIX path, at least one.

    Raises:
        DataError: Nothing is there, or no image in it.
    """
    if not (found := list_images(path_or_glob)):
        raise DataError(f"no images in {path_or_glob}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def list_images(path_or_glob: str) -> list[Path]:
    """What :func:`find_images` lists, or nothing while there is no image yet.

    Raises:
        DataError: Nothing is there and it is no glob, or a folder cannot be listed.
    """
    path = Path(path_or_glob)
    if path.is_dir():
        return walk_images(path)
    if path.exists():
        return [path]
    if _GLOB_CHARACTERS.isdisjoint(path_or_glob):
        raise DataError(f"{path_or_glob} does not exist; give an image, a folder or a quoted glob pattern")
    return _glob_images(path)


def glob_folder(path_or_glob: str) -> Path:
    """The folder in which all that an argument stands for lies: of a glob, what comes before its first pattern."""
    path = Path(path_or_glob)
    if path.exists():
        return path if path.is_dir() else path.parent
    plain = list(takewhile(_GLOB_CHARACTERS.isdisjoint, path.parts))
    return Path(*plain) if len(plain) < len(path.parts) else path


def walk_images(folder: Path) -> list[Path]:
    """List every image file below a folder, following links but entering no real folder twice.

    Args:
        folder: Where to look.

    Returns:
        Files sorted by POSIX path, perhaps none; names that start with a dot are skipped, as is a folder below that
        is removed meanwhile.

    Raises:
        DataError: A folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) or Path(error.filename) == folder:
            raise DataError(f"cannot list folder {error.filename}: {error.strerror}; check its permissions") from error

    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real_parent = os.path.realpath(parent)
        if real_parent in visited:
            folders.clear()
            continue
        visited.add(real_parent)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += (Path(parent, name) for name in names if not name.startswith("."))
    return _sorted_images(found)


def _glob_images(pattern: Path) -> list[Path]:
    # Path.glob does not follow links below **, so a link to a parent folder cannot send it round in circles.
    first = next(i for i, part in enumerate(pattern.parts) if not _GLOB_CHARACTERS.isdisjoint(part))
    base = Path(*pattern.parts[:first])
    try:
        matches = list(base.glob(str(Path(*pattern.parts[first:]))))
    except ValueError as error:
        raise DataError(f"cannot use the pattern {pattern}: {error}; write ** only between slashes") from error
    return _sorted_images(
        path
        for path in matches
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(base).parts)
    )


def _sorted_images(paths: Iterable[Path]) -> list[Path]:
    return sorted((path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES), key=Path.as_posix)


def _read_file(path: Path) -> bytes:
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise ImageError(f"cannot read image {path}: it is a folder; give a file in it")
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(f"cannot read image {path}: it is a device or a pipe; give a regular file")
        if info.st_size > _MAX_FILE_BYTES:
            raise ImageError(
                f"cannot read image {path}: {info.st_size:,} bytes, at most {_MAX_FILE_BYTES:,} are read; "
                "cut it into tiles"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"cannot read image {path}: it does not exist; check the path") from error
    except OSError as error:
        raise ImageError(f"cannot read image {path}: {error.strerror}; check its permissions") from error


def _decode(data: bytes, name: str, flags: int) -> MatLike:
    """Check the header, then decode: uint8 or uint16, [H, W] or [H, W, C] in OpenCV's BGR order."""
    _checked_header(data, name)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"cannot read image {name}: OpenCV refused it ({error.err}); save it again as PNG") from error
    if pixels is None:
        raise ImageError(f"cannot read image {name}: its pixels cannot be decoded; save it again as PNG")
    return pixels


def _checked_header(data: bytes, name: str) -> ImageHeader:
    if not data:
        raise ImageError(f"cannot read image {name}: 0 bytes; replace or remove the file")
    header = read_image_header(data)
    if header is None:
        raise ImageError(
            f"cannot read image {name}: it starts with {data[:8]!r}, which is no PNG, JPEG, BMP, TIFF or WebP file; "
            "convert it to one of them"
        )
    kind = f"cannot read image {name}: the {header.format} file"
    if header.width * header.height > MAX_PIXELS or max(header.width, header.height) > _MAX_SIDE:
        raise ImageError(
            f"{kind} is {header.width}x{header.height} pixels, at most {MAX_PIXELS // 1_000_000} megapixels and "
            f"{_MAX_SIDE:,} pixels a side are read; shrink it or cut it into tiles"
        )
    if header.damage:
        raise ImageError(f"{kind} {header.damage}: it is cut short or damaged; copy it again or remove it")
    if min(header.width, header.height) < 1:
        raise ImageError(f"{kind} is {header.width}x{header.height} pixels; replace or remove it")
    if header.is_multi_frame:
        raise ImageError(f"{kind} holds several pages or frames; save the one to inspect as its own file")
    if header.sample_format != "unsigned" or header.sample_bits not in _SUPPORTED_BITS:
        raise ImageError(
            f"{kind} has {header.sample_format} {header.sample_bits}-bit samples; save it with unsigned 8 or 16 bits"
        )
    return header
