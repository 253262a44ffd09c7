"""Pictures of a decision: evidence drawn over the image on one absolute colour scale, and the regions it marks.

The scale belongs to the model, never to the image: the same evidence has the same colour everywhere, and a good
part stays clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.calibrate import Calibration
from meliad_edge.runtime.predictor import Prediction, Region
from meliad_edge.runtime.view import Box

if TYPE_CHECKING:
    from cv2.typing import MatLike

_MAX_OPACITY = 0.75
_FULL_OPACITY_LEVEL = 0.5
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)
COMPARED_REGIONS = 3
# Sizes of a saved picture in pixels: images are enlarged to about this height, but not beyond this width.
_COMFORTABLE_HEIGHT, _LARGEST_WIDTH = 560, 1280
_SMALLEST_WIDTH = 320

_LEVELS = np.arange(256, dtype=np.uint8)
# RGB [256, 1, 3]; Inferno is perceptually uniform: equal steps of evidence look equally large.
_COLOURS = cv2.cvtColor(cv2.applyColorMap(_LEVELS, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB).reshape(256, 1, 3)
_OPACITIES = (_MAX_OPACITY * np.minimum(_LEVELS / 255.0 / _FULL_OPACITY_LEVEL, 1.0)).astype(np.float32)


def map_to_colour(evidence_map: NDArray[np.float32], value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Colour a map on a fixed scale.

    Args:
        evidence_map: [H, W]; not a number counts as the highest value.
        value_range: Values of the first and the last colour, ``Calibration.colour_range``; values outside are clipped.

    Returns:
        uint8 RGB [H, W, 3].
    """
    return _colour(_levels(evidence_map, value_range))


def overlay(
    image: NDArray[np.uint8],
    evidence_map: NDArray[np.float32],
    value_range: tuple[float, float],
    regions: Sequence[Region] = (),
    *,
    area: Box | None = None,
    caption: str = "",
) -> NDArray[np.uint8]:
    """Draw evidence over an image: nothing at or below the low end of the scale, more opaque the higher above.

    Args:
        image: uint8 RGB [H, W, 3]; not changed.
        evidence_map: [h, w], any size; enlarged bilinearly.
        value_range: Values of the first and the last colour, ``Calibration.colour_range``.
        regions: Outlined.
        area: The part of the image that the map covers; None is all of it.
        caption: One line of ASCII text in the upper left corner.

    Returns:
        uint8 RGB [H, W, 3].
    """
    height, width = image.shape[:2]
    if area is None:
        drawn = _blend(image, evidence_map, value_range)
    else:
        drawn = image.copy()
        rows, columns = slice(area.y, area.y + area.height), slice(area.x, area.x + area.width)
        drawn[rows, columns] = _blend(drawn[rows, columns], evidence_map, value_range)
    thickness = max(1, round(min(height, width) / 240))
    for region in regions:
        corners = (region.x, region.y), (region.x + region.width - 1, region.y + region.height - 1)
        cv2.rectangle(drawn, *corners, _BLACK, 3 * thickness)
        cv2.rectangle(drawn, *corners, _WHITE, thickness)
    if caption:
        _write(drawn, caption, (2 * thickness, 2 * thickness))
    return drawn


def colour_bar(
    value_range: tuple[float, float], threshold: float, *, size_hw: tuple[int, int] = (48, 320)
) -> NDArray[np.uint8]:
    """Draw the colour scale from left to right, with its ends and the threshold written on it.

    Args:
        value_range: Values of the first and the last colour.
        threshold: Marked value, on the scale of the map: ``Calibration.cell_threshold``.
        size_hw: Height and width in pixels.

    Returns:
        uint8 RGB [height, width, 3].
    """
    height, width = size_hw
    low, high = value_range
    band_height = height // 2
    bar = np.full((height, width, 3), 255, np.uint8)
    ramp = np.linspace(low, high, width, dtype=np.float32)[np.newaxis]
    bar[:band_height] = map_to_colour(ramp, value_range)
    mark = round((threshold - low) / (high - low) * (width - 1))
    if 0 <= mark < width:
        cv2.line(bar, (mark, 0), (mark, band_height + 3), _WHITE, 3)
        cv2.line(bar, (mark, 0), (mark, band_height + 3), _BLACK, 1)
    scale = height / 110
    for text, centre in ((f"{low:.2f}", 0), (f"threshold {threshold:.2f}", mark), (f"{high:.2f}", width)):
        text_width = cv2.getTextSize(text, _FONT, scale, 1)[0][0]
        left = min(max(centre - text_width // 2, 2), width - text_width - 2)
        cv2.putText(bar, text, (left, height - height // 6), _FONT, scale, _BLACK, 1, cv2.LINE_AA)
    return bar


def save_explanation(
    folder: Path, stem: str, image: NDArray[np.uint8], prediction: Prediction, calibration: Calibration
) -> None:
    """Write ``stem.png``, see :func:`explanation`, and ``stem.npy``, the raw map.

    Args:
        folder: Created when missing.
        stem: File name without suffix.
        image: uint8 RGB [H, W, 3] that the prediction was made on.
        prediction: What to show.
        calibration: Gives the colour scale.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = explanation(image, prediction, calibration)
    (folder / f"{stem}.png").write_bytes(encode_picture(picture, ".png"))
    np.save(folder / f"{stem}.npy", prediction.map)


def explanation(image: NDArray[np.uint8], prediction: Prediction, calibration: Calibration) -> NDArray[np.uint8]:
    """Draw a decision: the score, the evidence over the image with its colour bar, and what regions compare with.

    Beside the overlay stand the patches where the three highest regions peak, numbered as they are outlined in it,
    and the training patches behind each, where the model has any: the labelled defect that it is like, and the normal
    patch that it is unlike. All patches are three by three cells. Small images are enlarged by a whole factor.

    Args:
        image: uint8 RGB [H, W, 3] that the prediction was made on.
        prediction: What to show.
        calibration: Gives the colour scale.

    Returns:
        uint8 RGB, white where there is nothing.
    """
    height, width = image.shape[:2]
    factor = max(1, min(round(_COMFORTABLE_HEIGHT / height), _LARGEST_WIDTH // width))
    text = max(0.45, factor * height / 1100)
    enlarged = np.asarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC), np.uint8)
    regions = [
        replace(r, x=factor * r.x, y=factor * r.y, width=factor * r.width, height=factor * r.height)
        for r in prediction.regions
    ]
    drawn = overlay(enlarged, prediction.map, calibration.colour_range, regions)
    compared = [region for region in prediction.regions[:COMPARED_REGIONS] if region.resembles or region.differs_from]
    patches = [_peak_patch(prediction.map, region, image.shape) for region in compared]
    _number(drawn, factor * np.array(patches, np.int64).reshape(-1, 4), text)
    panel_width = max(_SMALLEST_WIDTH, drawn.shape[1])
    bar = colour_bar(calibration.colour_range, calibration.cell_threshold, size_hw=(round(107 * text), panel_width))
    parts = [_line(describe_score(prediction), panel_width, text), drawn, bar]
    panel = np.concatenate([_padded(part, part.shape[0], panel_width) for part in parts])
    if not compared:
        return panel
    rows = []
    for number, (region, (x, y, patch_width, patch_height)) in enumerate(zip(compared, patches, strict=True), 1):
        rows.append(_comparison(image[y : y + patch_height, x : x + patch_width], region, number, text))
    title = _line("Where regions peak, and the nearest training patches", rows[0].shape[1], text)
    column = np.concatenate([title, *rows])
    total = max(panel.shape[0], column.shape[0])
    gap = np.full((total, round(26 * text), 3), 255, np.uint8)
    return np.concatenate([_padded(panel, total, panel_width), gap, _padded(column, total, column.shape[1])], axis=1)


def _peak_patch(evidence: NDArray[np.float32], region: Region, image_hw: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The highest cell of a region and its neighbours, as the exemplars are cut: x, y, width, height in pixels."""
    sides = np.array(image_hw[:2])
    cell = sides / evidence.shape
    start, length = np.array([region.y, region.x]), np.array([region.height, region.width])
    centres = (np.argwhere(evidence == np.float32(region.peak)) + 0.5) * cell
    inside = ((centres >= start) & (centres < start + length)).all(axis=1)
    centre = centres[inside][0] if inside.any() else start + length / 2  # A peak that is not a number equals none.
    size = np.clip(np.rint(3 * cell), 1, sides)
    y, x = np.clip(np.rint(centre - size / 2), 0, sides - size).astype(int)
    return int(x), int(y), int(size[1]), int(size[0])


def _comparison(patch: NDArray[np.uint8], region: Region, number: int, text: float) -> NDArray[np.uint8]:
    """One row of the column: a patch and those it compares with, each over two lines of text."""
    tile, gap = round(260 * text), round(26 * text)
    shown = [
        (patch, f"region {number}", f"peak {region.peak:.2f}"),
        *(
            (exemplar.patch, f"{word} {exemplar.defect}", exemplar.source)
            for word, exemplar in (("like", region.resembles), ("unlike", region.differs_from))
            if exemplar is not None
        ),
    ]
    tiles = [
        np.concatenate([_square(picture, tile), *(_line(line, tile, text) for line in words)])
        for picture, *words in shown
    ]
    row = np.full((tiles[0].shape[0] + gap, 3 * (tile + gap), 3), 255, np.uint8)
    for index, drawn in enumerate(tiles):
        left = index * (tile + gap)
        row[: drawn.shape[0], left : left + tile] = drawn
    return row


def _square(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resized without keeping the aspect ratio, as model input is."""
    interpolation = cv2.INTER_CUBIC if max(picture.shape[:2]) <= side else cv2.INTER_AREA
    return np.asarray(cv2.resize(picture, (side, side), interpolation=interpolation), dtype=np.uint8)


def _number(image: NDArray[np.uint8], boxes: NDArray[np.int64], text: float) -> None:
    """Outline boxes (rows of x, y, width, height) thinly and write 1, 2, 3 beside them, or inside for want of room."""
    taken = [tuple(box) for box in boxes.tolist()]
    for x, y, width, height in boxes.tolist():
        cv2.rectangle(image, (x, y), (x + width - 1, y + height - 1), _BLACK, 1)
        cv2.rectangle(image, (x + 1, y + 1), (x + width - 2, y + height - 2), _WHITE, 1)
    for number, (x, y, width, height) in enumerate(boxes.tolist(), 1):
        (digit, tall), _ = cv2.getTextSize(str(number), _FONT, text, 1)
        size = digit + round(12 * text), tall + round(14 * text)
        places = [(x, y - size[1]), (x, y + height), (x - size[0], y), (x + width, y)]
        left, top = next((place for place in places if _is_free(place, size, taken, image.shape)), (x, y))
        taken.append((left, top, *size))
        cv2.rectangle(image, (left, top), (left + size[0] - 1, top + size[1] - 1), _BLACK, cv2.FILLED)
        corner = left + round(6 * text), top + size[1] - round(7 * text)
        cv2.putText(image, str(number), corner, _FONT, text, _WHITE, 1, cv2.LINE_AA)


def _is_free(
    place: tuple[int, int], size: tuple[int, int], taken: Sequence[tuple[int, ...]], shape: tuple[int, ...]
) -> bool:
    """Whether a box at (x, y) lies in the image and on none of the boxes (x, y, width, height)."""
    (x, y), (width, height) = place, size
    if x < 0 or y < 0 or x + width > shape[1] or y + height > shape[0]:
        return False
    return all(x >= a + w or a >= x + width or y >= b + h or b >= y + height for a, b, w, h in taken)


def _line(words: str, width: int, text: float) -> NDArray[np.uint8]:
    """One line in black on white; what is too long loses its middle, what is not ASCII becomes a question mark."""
    words = words.encode("ascii", "replace").decode()
    kept = len(words)
    shown = words
    while kept > 2 and cv2.getTextSize(shown, _FONT, text, 1)[0][0] > width - 4:
        kept -= 1
        shown = f"{words[: (kept + 1) // 2]}...{words[len(words) - kept // 2 :]}"
    strip = np.full((round(46 * text), width, 3), 255, np.uint8)
    cv2.putText(strip, shown, (2, round(30 * text)), _FONT, text, _BLACK, 1, cv2.LINE_AA)
    return strip


def _padded(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """With white added below and on the right."""
    rows, columns = height - picture.shape[0], width - picture.shape[1]
    return np.pad(picture, ((0, rows), (0, columns), (0, 0)), constant_values=255)


def describe_score(prediction: Prediction) -> str:
    """Score and threshold in words."""
    return f"score {prediction.score:.2f} (threshold {prediction.threshold:.2f})"


def encode_picture(image: NDArray[np.uint8], suffix: str) -> bytes:
    """Encode an RGB image, uint8 [H, W, 3], as ``.png`` or ``.jpg``."""
    _, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return data.tobytes()


def _blend(
    image: NDArray[np.uint8], evidence_map: NDArray[np.float32], value_range: tuple[float, float]
) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    levels = cv2.resize(_levels(evidence_map, value_range), (width, height), interpolation=cv2.INTER_LINEAR)
    opacity = cv2.LUT(levels, _OPACITIES)
    return np.asarray(cv2.blendLinear(image, _colour(levels), 1.0 - opacity, opacity), dtype=np.uint8)


def _levels(evidence_map: NDArray[np.float32], value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Place on the scale, 0 to 255."""
    low, high = value_range
    share = (np.nan_to_num(evidence_map, nan=high, posinf=high, neginf=low) - low) / (high - low)
    return np.asarray(np.rint(255.0 * np.clip(share, 0.0, 1.0)), dtype=np.uint8)


def _colour(levels: NDArray[np.uint8] | MatLike) -> NDArray[np.uint8]:
    return np.asarray(cv2.applyColorMap(levels, _COLOURS), dtype=np.uint8)


def _write(image: NDArray[np.uint8], text: str, corner: tuple[int, int]) -> None:
    """Write in white on a black ground, in letters that grow with the image."""
    scale = max(0.35, min(image.shape[:2]) / 700)
    (width, height), below = cv2.getTextSize(text, _FONT, scale, 1)
    x, y = corner
    cv2.rectangle(image, (0, 0), (x + width + x, y + height + below + y), _BLACK, cv2.FILLED)
    cv2.putText(image, text, (x, y + height), _FONT, scale, _WHITE, 1, cv2.LINE_AA)
