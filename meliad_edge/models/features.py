"""Frozen backbone features: of many images at once, kept on disk where asked, and as one vector per cell."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from meliad_edge.models.backbone import EVEN_MEAN, EVEN_SPREAD, SMALLEST_SPREAD, Backbone
from meliad_edge.progress import track

_BATCH = 16

_logger = logging.getLogger(__name__)


class FeatureExtractor:
    """The feature maps a frozen backbone gives for images, computed once and then read from a folder.

    A file is named after the preprocessing and weights of the backbone and the pixels of the image, so a cache may be
    shared by data sets, seeds, detectors and processes. The versions of torch and timm are not part of the name.

    Args:
        backbone: In evaluation mode.
        cache: Folder for the feature maps, made when missing; None keeps nothing.
    """

    def __init__(self, backbone: Backbone, cache: Path | None = None) -> None:
        self.backbone = backbone
        self._cache = None if cache is None else cache / _fingerprint(backbone)

    def levels_of_batch(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        """Feature maps of frames, in one pass through the backbone.

        Args:
            frames: uint8 RGB [n, H, W, 3], few enough for memory.

        Returns:
            One float32 [n, C, h, w] per stride of the backbone.
        """
        if self._cache is None:
            return self._compute(frames)
        paths = [[self._path(frame, stride) for stride in self.backbone.strides] for frame in frames]
        maps = [[_load(path) for path in row] for row in paths]
        missing = [index for index, row in enumerate(maps) if any(value is None for value in row)]
        if missing:
            for level, values in enumerate(self._compute(frames[missing])):
                for index, value in zip(missing, values, strict=True):
                    maps[index][level] = value
                    self._save(paths[index][level], value)
        return tuple(np.stack([row[level] for row in maps]) for level in range(len(self.backbone.strides)))  # type: ignore[misc]

    def _compute(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        with torch.inference_mode():
            levels: tuple[Tensor, ...] = self.backbone.to(memory_format=torch.channels_last)(torch.from_numpy(frames))
        return tuple(level.contiguous().numpy() for level in levels)

    def _save(self, path: Path, value: NDArray[np.float32]) -> None:
        """Write a file that another process sees whole or not at all; a full disk costs time and nothing else."""
        if self._cache is None:
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.save(file, value, allow_pickle=False)
            partial.replace(path)
        except OSError as error:
            _logger.warning("the feature cache %s cannot be written (%s); going on without it", self._cache, error)
            self._cache = None
            with contextlib.suppress(OSError):
                partial.unlink()

    def _path(self, frame: NDArray[np.uint8], stride: int) -> Path:
        assert self._cache is not None
        digest = hashlib.blake2b(frame.tobytes(), digest_size=16, salt=_salt(frame.shape)).hexdigest()
        return self._cache / digest[:2] / f"{digest}.stride{stride}.npy"


def pooled_levels(levels: Sequence[Tensor], *, zero_border: bool = False) -> tuple[Tensor, ...]:
    """Average each cell with its eight neighbours.

    Cells outside the image do not count; with ``zero_border`` they count as zeros, which shrinks the features of cells
    at the border, and with them their distances to others.
    """
    return tuple(functional.avg_pool2d(level, 3, 1, 1, count_include_pad=zero_border) for level in levels)


def patch_features(levels: Sequence[Tensor], *, zero_border: bool = False) -> Tensor:
    """All levels, pooled as in :func:`pooled_levels`, on the finest grid, one vector per cell: [N, sum of C, h, w]."""
    fine, *coarse = pooled_levels(levels, zero_border=zero_border)
    return torch.cat([fine, *(upsample_to(level, fine) for level in coarse)], dim=1)


def upsample_to(coarse: Tensor, fine: Tensor) -> Tensor:
    """Bilinear interpolation of the coarse level to the grid of the fine one."""
    return functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)


def interpolation_matrix(size: int, target: int) -> Tensor:
    """What :func:`upsample_to` does along one side, as a matrix [target, size]."""
    cells = torch.eye(size)[None]
    return functional.interpolate(cells, size=target, mode="linear", align_corners=False)[0].T.contiguous()


def extract_patch_features(
    features: FeatureExtractor, frames: NDArray[np.uint8], description: str
) -> NDArray[np.float32]:
    """Patch features of frames, float32 [n, h, w, sum of C], on the grid of the finest level.

    Args:
        features: Where feature maps come from.
        frames: uint8 RGB [n, H, W, 3], at least one.
        description: Label of the progress bar.
    """
    (patches,) = extract_features(features, frames, description, patch_features)
    return patches


def extract_features(
    features: FeatureExtractor,
    frames: NDArray[np.uint8],
    description: str,
    *kinds: Callable[[Sequence[Tensor]], Tensor],
) -> tuple[NDArray[np.float32], ...]:
    """What is made of the feature maps of frames, in one pass through the backbone.

    Args:
        features: Where feature maps come from.
        frames: uint8 RGB [n, H, W, 3], at least one.
        description: Label of the progress bar.
        kinds: From feature maps, one [N, C, h, w] per stride, to [N, D, h', w'] each.

    Returns:
        One float32 [n, h', w', D] per kind.
    """
    results: list[NDArray[np.float32]] = []
    for start in track(range(0, len(frames), _BATCH), description):
        levels = [torch.from_numpy(level) for level in features.levels_of_batch(frames[start : start + _BATCH])]
        made = [kind(levels).permute(0, 2, 3, 1).numpy() for kind in kinds]
        results = results or [np.empty((len(frames), *part.shape[1:]), np.float32) for part in made]
        for result, part in zip(results, made, strict=True):
            result[start : start + len(part)] = part
    return tuple(results)


def _fingerprint(backbone: Backbone) -> str:
    """Name, preprocessing and weights of a backbone."""
    digest = hashlib.blake2b(digest_size=8)
    if backbone.even_light:
        digest.update(repr((EVEN_MEAN, EVEN_SPREAD, SMALLEST_SPREAD)).encode())
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return f"{backbone.name}{'-even-light' if backbone.even_light else ''}-{digest.hexdigest()}"


def _salt(shape: tuple[int, ...]) -> bytes:
    """Frames of the same bytes and another shape are other frames."""
    return f"{shape[0]}x{shape[1]}".encode()[:16]


def _load(path: Path) -> NDArray[np.float32] | None:
    """A kept feature map; None where there is none, or what is there cannot be read."""
    try:
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)
    except (OSError, ValueError, EOFError):
        return None
