"""What an image file says about itself before a pixel is decoded: size, sample type, pages, damage.

Decoders differ between versions in what they let pass: a cut JPEG may come back with a grey remainder. Size and
completeness are therefore read from the container itself. Damage inside the compressed pixels of a complete JPEG,
TIFF or WebP file is not seen here; PNG is covered by its checksums.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_BMP_UNCOMPRESSED = (0, 3, 6)
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_ORIENTATION, _TIFF_SAMPLE_FORMAT = 256, 257, 258, 274, 339
# Where the strips or the tiles lie: (tag of the offsets, tag of the byte counts).
_TIFF_BLOCKS = ((273, 279), (324, 325))
_TIFF_TAGS = frozenset(
    {
        *(_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_ORIENTATION, _TIFF_SAMPLE_FORMAT),
        *(tag for pair in _TIFF_BLOCKS for tag in pair),
    }
)
_EXIF_PREFIX = b"Exif\0\0"
# A list of more values than any accepted image has rows is not unpacked.
_TIFF_MAX_VALUES = 1_000_000
_TIFF_TYPES = {1: "B", 3: "H", 4: "I"}
_TIFF_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "float"}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Facts about one image file.

    Attributes:
        format: ``"PNG"``, ``"JPEG"``, ``"BMP"``, ``"TIFF"`` or ``"WebP"``.
        width: Stored width in pixels, before any EXIF rotation; 0 when unknown.
        height: Stored height in pixels, before any EXIF rotation; 0 when unknown.
        sample_bits: Bits per channel.
        sample_format: ``"unsigned"``, ``"signed"``, ``"float"`` or ``"unknown"``.
        is_multi_frame: Whether it holds several pages or animation frames.
        is_turned: Whether its EXIF orientation exchanges width and height on a screen.
        damage: What is wrong with the file, to complete "the file ..."; empty when nothing is.
    """

    format: str
    width: int = 0
    height: int = 0
    sample_bits: int = 8
    sample_format: str = "unsigned"
    is_multi_frame: bool = False
    is_turned: bool = False
    damage: str = ""


def read_image_header(data: bytes) -> ImageHeader | None:
    """Read the header of an encoded image without decoding it.

    Args:
        data: The whole file.

    Returns:
        The header, or None when the bytes are no PNG, JPEG, BMP, TIFF or WebP file.
    """
    for name, matches, parse in _FORMATS:
        if matches(data):
            try:
                return parse(data)
            except struct.error:
                return ImageHeader(name, damage="ends inside its header")
    return None


def _parse_png(data: bytes) -> ImageHeader:
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    frames = 1
    exif = b""
    damage = "ends before its IEND chunk"
    view = memoryview(data)
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        is_critical = kind[:1].isupper()
        if is_critical and zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            name = kind.decode("ascii", "replace")
            damage = f"has a wrong checksum in its {name if name.isalpha() else 'damaged'} chunk"
            break
        if kind == b"acTL":
            frames = struct.unpack_from(">I", data, position + 8)[0]
        if kind == b"eXIf":
            exif = data[position + 8 : end - 4]
        if kind == b"IEND":
            damage = ""
            break
        position = end
    return ImageHeader(
        "PNG",
        width,
        height,
        sample_bits=bits,
        is_multi_frame=frames > 1,
        is_turned=_is_turned(exif),
        damage=damage,
    )


def _parse_jpeg(data: bytes) -> ImageHeader:
    width = height = 0
    bits = 8
    exif = b""
    position = 2
    while True:
        prefix, marker = struct.unpack_from(">BB", data, position)
        if prefix != 0xFF:
            return ImageHeader("JPEG", width, height, damage=f"has no marker at byte {position}")
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a body
            position += 2
            continue
        if marker in (0xD9, 0xDA):  # end of image, start of scan
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width = struct.unpack_from(">BHH", data, position + 4)
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        if marker == 0xE1 and data.startswith(_EXIF_PREFIX, position + 4):
            exif = data[position + 4 : end]
        position = end
    # Inside a scan 0xFF is always escaped, so the pair below is the end marker. Thumbnails lie before the scan,
    # and cameras append things after the end.
    is_complete = data.find(b"\xff\xd9", position + 2) >= 0
    return ImageHeader(
        "JPEG",
        width,
        height,
        sample_bits=bits,
        is_turned=_is_turned(exif),
        damage="" if is_complete else "ends before its end-of-image marker",
    )


def _parse_bmp(data: bytes) -> ImageHeader:
    file_bytes, _, pixel_offset, header_bytes = struct.unpack_from("<IIII", data, 2)
    compression = 0
    if header_bytes == 12:
        width, height, _, bits_per_pixel = struct.unpack_from("<HHHH", data, 18)
    else:
        width, height, _, bits_per_pixel, compression = struct.unpack_from("<iiHHI", data, 18)
        height = abs(height)  # negative when the rows run from the top
    if compression in _BMP_UNCOMPRESSED:
        file_bytes = pixel_offset + (width * bits_per_pixel + 31) // 32 * 4 * height
    return ImageHeader("BMP", width, height, damage=_shortfall(data, file_bytes))


def _parse_tiff(data: bytes) -> ImageHeader:
    tags, next_directory = _read_tiff_directory(data)
    block_ends = [
        offset + size
        for offsets, sizes in _TIFF_BLOCKS
        for offset, size in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=False)
    ]
    return ImageHeader(
        "TIFF",
        width=max(tags.get(_TIFF_WIDTH, ()), default=0),
        height=max(tags.get(_TIFF_HEIGHT, ()), default=0),
        sample_bits=max(tags.get(_TIFF_BITS, ()), default=1),
        sample_format=_TIFF_SAMPLE_FORMATS.get(max(tags.get(_TIFF_SAMPLE_FORMAT, ()), default=1), "unknown"),
        is_multi_frame=next_directory != 0,
        is_turned=_exchanges_sides(tags),
        damage=_shortfall(data, max(block_ends, default=0)),
    )


def _read_tiff_directory(data: bytes) -> tuple[dict[int, tuple[int, ...]], int]:
    """Values of the tags of interest in the first directory, and where the next one is (0: nowhere)."""
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, directory)
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
        if tag in _TIFF_TAGS and kind in _TIFF_TYPES and length <= _TIFF_MAX_VALUES:
            layout = f"{order}{length}{_TIFF_TYPES[kind]}"
            fits = struct.calcsize(layout) <= 4
            offset = entry + 8 if fits else struct.unpack_from(f"{order}I", data, entry + 8)[0]
            tags[tag] = struct.unpack_from(layout, data, offset)
    (next_directory,) = struct.unpack_from(f"{order}I", data, directory + 2 + 12 * count)
    return tags, next_directory


def _is_turned(exif: bytes) -> bool:
    """Whether EXIF data, which is a TIFF file without pixels, exchanges width and height; damaged data does not."""
    try:
        tags, _ = _read_tiff_directory(exif.removeprefix(_EXIF_PREFIX))
    except struct.error:
        return False
    return _exchanges_sides(tags)


def _exchanges_sides(tags: dict[int, tuple[int, ...]]) -> bool:
    return max(tags.get(_TIFF_ORIENTATION, ()), default=1) in range(5, 9)


def _parse_webp(data: bytes) -> ImageHeader:
    (riff_bytes, kind) = struct.unpack_from("<I4x4s", data, 4)
    is_animation = False
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:  # VP8X: canvas sides minus one in three bytes each
        (flags,) = struct.unpack_from("<B", data, 20)
        is_animation = bool(flags & 0x02)
        packed_sides = struct.unpack_from("<6s", data, 24)[0]
        width, height = (int.from_bytes(side, "little") + 1 for side in (packed_sides[:3], packed_sides[3:]))
    return ImageHeader(
        "WebP",
        width,
        height,
        is_multi_frame=is_animation,
        is_turned=_is_turned(_webp_exif(data)),
        damage=_shortfall(data, 8 + riff_bytes),
    )


def _webp_exif(data: bytes) -> bytes:
    """The EXIF chunk; empty when there is none."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            return data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    return b""


def _shortfall(data: bytes, expected_bytes: int) -> str:
    return "" if len(data) >= expected_bytes else f"has {len(data):,} of {expected_bytes:,} bytes"


_FORMATS: tuple[tuple[str, Callable[[bytes], bool], Callable[[bytes], ImageHeader]], ...] = (
    ("PNG", lambda data: data.startswith(_PNG_SIGNATURE), _parse_png),
    ("JPEG", lambda data: data.startswith(b"\xff\xd8\xff"), _parse_jpeg),
    ("TIFF", lambda data: data.startswith((b"II*\0", b"MM\0*")), _parse_tiff),
    ("WebP", lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP", _parse_webp),
    # Two letters are a weak signature: the size of the second header must be one of the known ones as well.
    ("BMP", lambda data: data.startswith(b"BM") and _bmp_header_bytes(data) in _BMP_HEADER_SIZES, _parse_bmp),
)


def _bmp_header_bytes(data: bytes) -> int:
    return int.from_bytes(data[14:18], "little")
