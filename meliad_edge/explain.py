"""Pictures of a decision: evidence drawn over the image on one absolute colour scale, and the regions it marks.

The scale belongs to the model, never to the image: the same evidence has the same colour everywhere, and a good
part stays clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.calibrate import Calibration
from meliad_edge.runtime.predictor import Prediction, Region

if TYPE_CHECKING:
    from cv2.typing import MatLike

_MAX_OPACITY = 0.75
_FULL_OPACITY_LEVEL = 0.5
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)

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
    caption: str = "",
) -> NDArray[np.uint8]:
    """Draw evidence over an image: nothing at or below the low end of the scale, more opaque the higher above.

    Args:
        image: uint8 RGB [H, W, 3]; not changed.
        evidence_map: [h, w], any size; enlarged bilinearly.
        value_range: Values of the first and the last colour, ``Calibration.colour_range``.
        regions: Outlined.
        caption: One line of ASCII text in the upper left corner.

    Returns:
        uint8 RGB [H, W, 3].
    """
    height, width = image.shape[:2]
    levels = cv2.resize(_levels(evidence_map, value_range), (width, height), interpolation=cv2.INTER_LINEAR)
    opacity = cv2.LUT(levels, _OPACITIES)
    drawn = np.asarray(cv2.blendLinear(image, _colour(levels), 1.0 - opacity, opacity), dtype=np.uint8)
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
    """Write ``stem.png``, the overlay with its colour bar below, and ``stem.npy``, the raw map.

    Args:
        folder: Created when missing.
        stem: File name without suffix.
        image: uint8 RGB [H, W, 3] that the prediction was made on.
        prediction: What to show.
        calibration: Gives the colour scale.
    """
    value_range = calibration.colour_range
    drawn = overlay(image, prediction.map, value_range, prediction.regions, caption=describe_score(prediction))
    bar = colour_bar(value_range, calibration.cell_threshold, size_hw=(48, max(320, image.shape[1])))
    missing = bar.shape[1] - image.shape[1]
    drawn = np.pad(drawn, ((0, 0), (0, missing), (0, 0)), constant_values=255)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.png").write_bytes(encode_picture(np.concatenate([drawn, bar]), ".png"))
    np.save(folder / f"{stem}.npy", prediction.map)


def describe_score(prediction: Prediction) -> str:
    """Score and threshold in words."""
    return f"score {prediction.score:.2f} (threshold {prediction.threshold:.2f})"


def encode_picture(image: NDArray[np.uint8], suffix: str) -> bytes:
    """Encode an RGB image, uint8 [H, W, 3], as ``.png`` or ``.jpg``."""
    _, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return data.tobytes()


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
