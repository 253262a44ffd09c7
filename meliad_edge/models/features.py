"""Frozen backbone features of many images, as the detectors are fitted on them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from meliad_edge.models.backbone import Backbone
from meliad_edge.progress import track


def pooled_levels(levels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Average each cell with its eight neighbours; cells outside the image do not count."""
    fine, coarse = (functional.avg_pool2d(level, 3, 1, 1, count_include_pad=False) for level in levels)
    return fine, coarse


def patch_features(levels: tuple[Tensor, Tensor]) -> Tensor:
    """Both levels on the finer grid, one vector per cell: [N, C16 + C32, h, w]."""
    fine, coarse = pooled_levels(levels)
    return torch.cat([fine, upsample_to(coarse, fine)], dim=1)


def upsample_to(coarse: Tensor, fine: Tensor) -> Tensor:
    """Bilinear interpolation of the coarse level to the grid of the fine one."""
    return functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)


def extract_patch_features(
    backbone: Backbone, frames: NDArray[np.uint8], description: str, batch_size: int = 16
) -> NDArray[np.float32]:
    """Patch features of frames.

    Args:
        backbone: In evaluation mode.
        frames: uint8 RGB [n, H, W, 3].
        description: Label of the progress bar.
        batch_size: Frames per forward pass.

    Returns:
        float32 [n, h, w, C16 + C32].
    """
    channels = sum(backbone.channels)
    grid = (frames.shape[1] // 16, frames.shape[2] // 16)
    features = np.empty((len(frames), *grid, channels), np.float32)
    model: nn.Module = backbone.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for start in track(range(0, len(frames), batch_size), description):
            batch = torch.from_numpy(frames[start : start + batch_size])
            features[start : start + len(batch)] = patch_features(model(batch)).permute(0, 2, 3, 1).numpy()
    return features
