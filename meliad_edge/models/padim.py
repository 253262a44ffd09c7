"""PaDiM: a Gaussian of normal features for every position of the image (Defard et al., 2020).

As in the paper [paper]: three levels on one grid, a random subset of their channels, a Gaussian per position with
0.01 I added to its covariance (equation 1), the Mahalanobis distance as the map (equation 2), smoothed by a Gaussian of
4 pixels, and its maximum as the score. The grid is [ours]: the paper's has a cell for every 4 x 4 pixels, which for
256 x 256 pixels makes 164 MB of covariances; by default ours has one for every 8 x 8, a quarter of that. Smoothing the
map on its grid, where the paper first enlarges it to pixels, is [ours] too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from meliad_edge.errors import UsageError
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import (
    Detector,
    FittedDetector,
    FrozenBackboneNetwork,
    TrainingImages,
    no_prototypes,
    register,
)
from meliad_edge.progress import track

# Epsilon of equation 1.
REGULARISATION = 0.01
SMOOTHING_PIXELS = 4.0
_FULL_STRIDE = 4
_DEFAULT_STRIDE = 8
_BATCH = 16
_POSITIONS = 256
# A part of a bundle may have 512 MiB, and the graph holds the backbone too.
_MAX_FACTOR_BYTES = 480 * 1024 * 1024


class PadimNetwork(FrozenBackboneNetwork):
    """Backbone and one Gaussian per cell; it has no prototypes to name.

    Args:
        backbone: Of strides 4, 8 and 16.
        input_hw: Height and width of frames.
        grid_stride: Pixels per cell.
        channels: Which of the concatenated channels are used, int64 [d].
        mean: float32 [h * w, d].
        factor: Inverse L^-1 of the Cholesky factor of each covariance L L^T, float32 [h * w, d, d].
    """

    channels: Tensor
    mean: Tensor
    factor: Tensor
    smoothing: Tensor

    def __init__(
        self,
        backbone: Backbone,
        input_hw: tuple[int, int],
        *,
        grid_stride: int,
        channels: Tensor,
        mean: Tensor,
        factor: Tensor,
    ) -> None:
        super().__init__(backbone, input_hw)
        self.grid_stride = grid_stride
        self.register_buffer("channels", channels)
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)
        self.register_buffer("smoothing", gaussian_kernel(SMOOTHING_PIXELS / grid_stride), persistent=False)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """One cell for every ``grid_stride`` pixels."""
        return self.input_hw[0] // self.grid_stride, self.input_hw[1] // self.grid_stride

    @property
    def top_cells(self) -> int:
        """The score is the largest cell of the map."""
        return 1

    def describe(self) -> dict[str, Any]:
        """The grid; the tensors say the rest."""
        return {"grid_stride": self.grid_stride}

    def score_levels(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Score feature maps of strides 4, 8 and 16; the map holds smoothed Mahalanobis distances."""
        embeddings = embed(levels, self.grid_hw, self.channels)
        deviation = embeddings.permute(1, 2, 0) - self.mean.unsqueeze(-1)  # [hw, d, N]
        distances = torch.matmul(self.factor, deviation).square().sum(1).sqrt()  # [hw, N]
        evidence = smooth(distances.t().reshape(-1, *self.grid_hw), self.smoothing)
        return evidence.flatten(1).amax(1), evidence, no_prototypes(evidence)


def embed(levels: tuple[Tensor, ...], grid_hw: tuple[int, int], channels: Tensor) -> Tensor:
    """Feature maps on one grid, and of their channels those wanted: [N, hw, d].

    A coarser map repeats its cells, as in the authors' figures and in anomalib [code]; a finer one is averaged [ours].
    """
    aligned = torch.cat([_align(level, grid_hw) for level in levels], dim=1)
    return aligned.index_select(1, channels).flatten(2).transpose(1, 2)


def gaussian_kernel(sigma: float) -> Tensor:
    """Weights of a Gaussian cut off at four sigma, float32 [1, 1, k, k] that sum to one."""
    radius = int(4.0 * sigma + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma).square())
    plane = line.unsqueeze(1) * line
    return (plane / plane.sum()).unsqueeze(0).unsqueeze(0)


def smooth(maps: Tensor, kernel: Tensor) -> Tensor:
    """Convolve maps [N, h, w] with a kernel [1, 1, k, k]; they are mirrored at their edges, without the edge cell."""
    radius = kernel.shape[-1] // 2
    padded = functional.pad(maps.unsqueeze(1), (radius, radius, radius, radius), mode="reflect")
    return functional.conv2d(padded, kernel).squeeze(1)


@register("padim")
@dataclass(frozen=True, slots=True)
class Padim(Detector):
    """Estimates the Gaussians in one pass. It learns nothing from labelled defects: shots are ignored.

    Attributes:
        channels: Channels kept of all levels, d. Tensors grow with its square: 41 MB for 100 at 256 x 256 pixels.
        full_grid: Whether the map has the paper's cell for every 4 x 4 pixels, at four times the size.
    """

    channels: Annotated[int, Field(ge=1)] = 100
    full_grid: bool = False

    strides: ClassVar[tuple[int, ...]] = (4, 8, 16)

    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Fit on normal images alone, in one pass; ``images.shots`` is not read.

        Raises:
            UsageError: The backbone has fewer channels, or the Gaussians would not fit in a bundle.
        """
        available = sum(features.backbone.channels)
        if self.channels > available:
            msg = f"padim: option channels = {self.channels}, but the backbone has {available}; use that or fewer"
            raise UsageError(msg)
        input_hw = images.size_hw
        stride = _FULL_STRIDE if self.full_grid else _DEFAULT_STRIDE
        grid_hw = input_hw[0] // stride, input_hw[1] // stride
        _refuse_too_many(grid_hw, self.channels)
        chosen = np.random.default_rng(seed).choice(available, self.channels, replace=False)
        channels = torch.from_numpy(np.sort(chosen))
        mean, covariance = _gaussians(features, images.normal, grid_hw, channels)
        network = PadimNetwork(
            features.backbone,
            input_hw,
            grid_stride=stride,
            channels=channels,
            mean=mean.float(),
            factor=_inverse_factors(covariance),
        )
        facts = {"channels": self.channels, "gaussians": len(mean), "labelled_defects_used": 0}
        return FittedDetector(network.eval(), (), facts)

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> PadimNetwork:
        """Rebuild a fitted network from its tensors and its grid."""
        network = PadimNetwork(
            backbone,
            input_hw,
            channels=state["channels"],
            mean=state["mean"],
            factor=state["factor"],
            **description,
        )
        network.load_state_dict(state)
        return network


def _align(level: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    if level.shape[-1] > grid_hw[1]:
        return functional.avg_pool2d(level, level.shape[-1] // grid_hw[1])
    return functional.interpolate(level, size=grid_hw, mode="nearest")


def _refuse_too_many(grid_hw: tuple[int, int], channels: int) -> None:
    size = grid_hw[0] * grid_hw[1] * channels**2 * 4
    if size > _MAX_FACTOR_BYTES:
        msg = (
            f"padim: {grid_hw[0]} x {grid_hw[1]} Gaussians of {channels} channels take {size >> 20} MiB, "
            f"{_MAX_FACTOR_BYTES >> 20} MiB fit in a bundle; use a smaller --image-size, or fewer --option channels"
        )
        raise UsageError(msg)


def _gaussians(
    features: FeatureExtractor, frames: NDArray[np.uint8], grid_hw: tuple[int, int], channels: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean [hw, d] and unbiased covariance [hw, d, d] plus 0.01 I of each cell, float64, in one pass (equation 1)."""
    cells, depth = grid_hw[0] * grid_hw[1], len(channels)
    total = torch.zeros(cells, depth, dtype=torch.float64)
    products = torch.zeros(cells, depth, depth, dtype=torch.float64)
    for start in track(range(0, len(frames), _BATCH), "features of normals"):
        levels = features.levels_of_batch(frames[start : start + _BATCH])
        batch = embed(tuple(torch.from_numpy(level) for level in levels), grid_hw, channels).double()
        total += batch.sum(0)
        products.baddbmm_(batch.permute(1, 2, 0), batch.transpose(0, 1))
    mean = total / len(frames)
    covariance = products.baddbmm_(total.unsqueeze(2), mean.unsqueeze(1), alpha=-1.0)
    # One image has no spread: the regularisation alone is its covariance.
    covariance /= max(1, len(frames) - 1)
    covariance.diagonal(dim1=1, dim2=2).add_(REGULARISATION)
    return mean, covariance


def _inverse_factors(covariance: Tensor) -> Tensor:
    """L^-1 of every covariance L L^T, float32 [hw, d, d]: |L^-1 (x - mean)| is the Mahalanobis distance."""
    unit = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    factors = torch.empty(covariance.shape)
    for start in range(0, len(covariance), _POSITIONS):
        lower = torch.linalg.cholesky(covariance[start : start + _POSITIONS])
        factors[start : start + _POSITIONS] = torch.linalg.solve_triangular(lower, unit, upper=False)
    return factors
