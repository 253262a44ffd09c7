"""Self-supervised corruptions: a normal image with something that does not belong in a few smooth regions.

After SSAE (Bauer, Nakajima, Müller, arXiv 2206.11723), of which we know second-hand that a random smooth mask, a blob
or the outline of an ellipse, is filled with an elastically deformed crop or a foreign texture. Every size, strength
and probability here is ours, and so are the textures, which are drawn and need no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MOST_REGIONS = 3
# Half axes of a region in units of the shorter image side.
SMALLEST_RADIUS, LARGEST_RADIUS = 0.02, 0.35
OUTLINE_SHARE = 0.4
FOREIGN_SHARE = 0.5
# Largest change of the logarithm of a crop's brightness.
GAIN_RANGE = 0.7


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A corrupted image and where it was changed.

    Attributes:
        image: float32 RGB [H, W, 3] in [0, 1]; exactly the clean image where the mask is 0.
        mask: M, float32 [H, W] in [0, 1].
    """

    image: Floats
    mask: Floats


def corrupt(clean: NDArray[np.uint8], donor: NDArray[np.uint8], rng: np.random.Generator) -> Corrupted:
    """Mix something foreign into an image: (1 - M) x + M T.

    Args:
        clean: x, uint8 RGB [H, W, 3].
        donor: Image that an elastically deformed crop is taken from, uint8 RGB [H, W, 3]; may be ``clean``.
        rng: Source of the mask M, of the choice of the filling T, and of the filling.
    """
    size_hw = (clean.shape[0], clean.shape[1])
    mask = smooth_mask(size_hw, rng)
    filling = foreign_texture(size_hw, rng) if rng.random() < FOREIGN_SHARE else elastic_crop(donor, rng)
    weight = mask[..., None]
    image = (1.0 - weight) * (clean.astype(np.float32) / 255.0) + weight * filling
    return Corrupted(image.astype(np.float32), mask)


def smooth_mask(size_hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    """One to three blobs or ellipse outlines with soft edges, float32 [H, W] in [0, 1]; 1 in at least one pixel."""
    mask = np.zeros(size_hw, np.float32)
    for _ in range(int(rng.integers(1, MOST_REGIONS + 1))):
        np.maximum(mask, _region(size_hw, rng), out=mask)
    return mask


def _region(size_hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    """A blob, or the outline of one ellipse."""
    height, width = size_hw
    shorter = min(size_hw)
    # Uniform in the logarithm: as many small defects as large ones.
    half_axes = shorter * np.exp(rng.uniform(np.log(SMALLEST_RADIUS), np.log(LARGEST_RADIUS), 2))
    dx, dy = _rotated_offsets(size_hw, (rng.uniform(0, height), rng.uniform(0, width)), rng.uniform(0, np.pi))
    radius = np.hypot(dx / half_axes[0], dy / half_axes[1])  # 1 on the ellipse
    if rng.random() < OUTLINE_SHARE:
        thickness_px = shorter * rng.uniform(0.004, 0.02)
        inside = np.abs(radius - 1.0) * half_axes.min() < thickness_px
    else:
        inside = radius < _wobble(np.arctan2(dy, dx), rng)
    soft = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), max(0.5, shorter * rng.uniform(0.002, 0.01)))
    # A small region stays opaque in its middle; a region that misses the pixels leaves one.
    if soft.max() < 1e-3:
        soft[rng.integers(height), rng.integers(width)] = 1.0
    soft[soft < 1e-3 * soft.max()] = 0.0
    return np.asarray(soft / soft.max(), np.float32)


def _wobble(angle: Floats, rng: np.random.Generator) -> Floats:
    """Radius of a closed smooth curve around the unit circle."""
    curve = np.ones_like(angle)
    for waves in range(2, 6):
        curve += rng.normal(0.0, 0.35 / waves) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    return curve


def elastic_crop(donor: NDArray[np.uint8], rng: np.random.Generator) -> Floats:
    """A rotated, scaled, elastically deformed and darker or brighter view of some other place of an image.

    Returns:
        float32 RGB [H, W, 3] in [0, 1].
    """
    height, width = donor.shape[:2]
    centre = (height / 2.0, width / 2.0)
    dx, dy = _rotated_offsets((height, width), centre, rng.uniform(0, 2 * np.pi))
    scale = rng.uniform(0.6, 1.4)
    amplitude_px = min(height, width) * rng.uniform(0.01, 0.05)
    x = rng.uniform(0, width) + scale * dx + amplitude_px * _smooth_noise((height, width), 8, rng)
    y = rng.uniform(0, height) + scale * dy + amplitude_px * _smooth_noise((height, width), 8, rng)
    deformed = cv2.remap(donor, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    gain = np.exp(rng.uniform(-GAIN_RANGE, GAIN_RANGE))
    return np.asarray(np.minimum(deformed.astype(np.float32) * np.float32(gain / 255.0), 1.0), np.float32)


def foreign_texture(size_hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    """A drawn texture between two random colours, float32 [H, W, 3] in [0, 1]: flat, smooth, grainy or striped."""
    draw = _PATTERNS[int(rng.integers(len(_PATTERNS)))]
    pattern = np.clip(draw(size_hw, rng), 0.0, 1.0)[..., None]
    # Mostly grey, so that a set of grey images is not told by colour alone.
    grey, tint = rng.uniform(0.0, 1.0, (2, 1)), rng.uniform(-0.2, 0.2, (2, 3)) * (rng.random() < 0.5)
    low, high = np.clip(grey + tint, 0.0, 1.0).astype(np.float32)
    return np.asarray((1.0 - pattern) * low + pattern * high, np.float32)


def _flat(size_hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    return np.zeros(size_hw, np.float32)


def _clouds(size_hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    return 0.5 + 0.4 * _smooth_noise(size_hw, int(rng.integers(3, 33)), rng)


def _grain(size_hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    return np.asarray(0.5 + 0.3 * rng.standard_normal(size_hw), np.float32)


def _stripes(size_hw: tuple[int, int], rng: np.random.Generator) -> Floats:
    dx, _ = _rotated_offsets(size_hw, (0.0, 0.0), rng.uniform(0, np.pi))
    period_px = rng.uniform(4.0, max(8.0, min(size_hw) / 8.0))
    return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * dx / period_px + rng.uniform(0, 2 * np.pi)), np.float32)


_PATTERNS: tuple[Callable[[tuple[int, int], np.random.Generator], Floats], ...] = (_flat, _clouds, _grain, _stripes)


def _smooth_noise(size_hw: tuple[int, int], cells: int, rng: np.random.Generator) -> Floats:
    """Noise of unit variance at the knots of a grid of that many cells per side, interpolated smoothly."""
    knots = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(knots, size_hw[::-1], interpolation=cv2.INTER_CUBIC), np.float32)


def _rotated_offsets(size_hw: tuple[int, int], centre_yx: tuple[float, float], angle: float) -> tuple[Floats, Floats]:
    """Pixel coordinates relative to a centre, along and across a direction; two float32 [H, W]."""
    y, x = np.indices(size_hw, dtype=np.float32)
    y, x = y - np.float32(centre_yx[0]), x - np.float32(centre_yx[1])
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x
