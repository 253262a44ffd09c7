"""Whether maps are faithful to the network: does the score follow their cells, and do they follow the weights?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meliad_edge.models.network import DetectorNetwork
from meliad_edge.progress import track
from meliad_edge.runtime.engine import Engine, infer_all
from meliad_edge.runtime.torch_engine import TorchEngine

CURVE_STEPS = 8
# Rank correlation at or above which maps hardly depend on the weights.
RANDOMISED_LIMIT = 0.5
_THUMBNAIL = (32, 32)
_BATCH = 8


@dataclass(frozen=True, slots=True)
class ScoreCurves:
    """Deletion and insertion (after Petsiuk et al., 2018): mean score against the share of cells replaced.

    Scores are 0 at the typical normal score and 1 at the image's own, and clipped to that range.

    Attributes:
        shares: Shares of the cells, from 0 to 1.
        deletion: Cells of the anomaly replaced by a normal image, highest evidence first; lower is better.
        insertion: Cells of the anomaly put into that normal image, highest evidence first; higher is better.
        deletion_random, insertion_random: The same in random order.
        images: How many the means run over.
    """

    shares: tuple[float, ...]
    deletion: tuple[float, ...]
    deletion_random: tuple[float, ...]
    insertion: tuple[float, ...]
    insertion_random: tuple[float, ...]
    images: int

    def area(self, curve: Sequence[float]) -> float:
        """Area under one of the curves by trapezoids, in [0, 1]."""
        heights = np.asarray(curve)
        return float(np.sum(np.diff(self.shares) * (heights[1:] + heights[:-1]) / 2.0))


@dataclass(frozen=True, slots=True)
class Randomisation:
    """Do the maps change when the weights are made random (Adebayo et al., 2018)?

    Attributes:
        correlation: Mean Spearman rank correlation of the maps before and after, in [-1, 1].
        images: How many the mean runs over.
        unusable_maps: Maps of the random network that are constant or not finite; they count as correlation 0.
    """

    correlation: float
    images: int
    unusable_maps: int

    @property
    def passed(self) -> bool:
        """Whether the maps depend on the weights: correlation between -0.5 and 0.5, a limit of ours."""
        return abs(self.correlation) < RANDOMISED_LIMIT


def score_curves(
    engine: Engine,
    frames: NDArray[np.uint8],
    fills: NDArray[np.uint8],
    maps: NDArray[np.float32],
    scores: NDArray[np.float32],
    *,
    typical_score: float,
    seed: int,
) -> ScoreCurves:
    """Replace more and more cells of each image by those of another and score every step.

    The steps double: 1/128, 1/64 ... 1/2 and all of the cells, at least one.

    Args:
        engine: Scores the images that are made.
        frames: Anomalous images, uint8 RGB [n, H, W, 3].
        fills: What replaces the cells of each, same shape.
        maps: Of the frames, [n, h, w]: which cells go first.
        scores: Raw, of the frames, [n]; each above ``typical_score``.
        typical_score: Raw score that becomes 0.
        seed: Of the random orders.
    """
    cells = maps[0].size
    counts = np.unique(np.ceil(cells * 2.0 ** np.arange(1 - CURVE_STEPS, 1)).astype(int))
    generator = np.random.default_rng(seed)
    curves = np.empty((4, len(frames), len(counts) + 1))
    for index in track(range(len(frames)), "deletion and insertion"):
        frame, fill = frames[index], fills[index]
        by_evidence = np.argsort(-maps[index], axis=None, kind="stable")
        pictures = [fill]
        for order in (by_evidence, generator.permutation(cells)):
            rank = np.argsort(order).reshape(maps[index].shape)
            for top, below in ((fill, frame), (frame, fill)):
                pictures += [_compose(top, below, rank < count) for count in counts[:-1]]
        made = np.concatenate([engine.infer(np.stack(batch)).score for batch in _batches(pictures)])
        levels = np.clip((made - typical_score) / (scores[index] - typical_score), 0.0, 1.0)
        # Deletion begins at the image itself and ends at the fill, insertion the other way round.
        begins = np.array([1.0, levels[0], 1.0, levels[0]])
        curves[:, index] = np.column_stack([begins, levels[1:].reshape(4, len(counts) - 1), begins[::-1]])
    deletion, insertion, deletion_random, insertion_random = (tuple(map(float, c)) for c in curves.mean(axis=1))
    shares = (0.0, *(float(count / cells) for count in counts))
    return ScoreCurves(shares, deletion, deletion_random, insertion, insertion_random, len(frames))


def nearest_images(frames: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """For each frame the one of the others with the least mean squared difference, both shrunk to 32 x 32 pixels.

    Args:
        frames: uint8 [n, H, W, 3].
        others: uint8 [m, H, W, 3], m > 0.

    Returns:
        uint8 [n, H, W, 3].
    """
    small, small_others = (
        np.array([cv2.resize(image, _THUMBNAIL, interpolation=cv2.INTER_AREA) for image in images], np.float32)
        for images in (frames, others)
    )
    nearest = [int(np.argmin(np.mean((small_others - image) ** 2, axis=(1, 2, 3)))) for image in small]
    return others[nearest]


def randomisation_check(
    network: DetectorNetwork, frames: NDArray[np.uint8], maps: NDArray[np.float32], *, seed: int
) -> Randomisation:
    """Compare maps with those of the same network after :func:`randomise_weights`.

    Args:
        network: What made the maps; not changed.
        frames: uint8 RGB [n, H, W, 3], n > 0.
        maps: Of the frames, [n, h, w].
        seed: Of the random weights.
    """
    randomised = infer_all(TorchEngine(randomise_weights(network, frames, seed=seed)), frames, "random weights").map
    correlations = [rank_correlation(before, after) for before, after in zip(maps, randomised, strict=True)]
    usable = [value for value in correlations if value is not None]
    return Randomisation(sum(usable) / len(correlations), len(correlations), len(correlations) - len(usable))


def randomise_weights(network: DetectorNetwork, frames: NDArray[np.uint8], *, seed: int) -> DetectorNetwork:
    """A copy of a network whose learned features are destroyed and whose scale of values is kept.

    The values of each parameter tensor of its ``backbone``, or of the whole network where it has none, change places
    at random. Batch normalisation then gets the statistics of the new activations, without which they would vanish
    or overflow from layer to layer.

    Args:
        network: Not changed.
        frames: Images to take those statistics from, uint8 RGB [n, H, W, 3].
        seed: Of the order.
    """
    randomised = copy.deepcopy(network).eval()
    part: nn.Module = getattr(randomised, "backbone", randomised)
    generator = torch.Generator().manual_seed(seed)
    normalisations = [m for m in part.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    with torch.no_grad():
        for parameter in part.parameters():
            shuffled = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[shuffled].view_as(parameter))
        for normalisation in normalisations:
            normalisation.momentum = 1.0  # The statistics of this one batch.
            normalisation.train()
        randomised(torch.from_numpy(frames))
    return randomised.eval()


def rank_correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float | None:
    """Spearman's rank correlation of two maps of one shape, ties sharing their mean rank; None where it has none."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None
    deviations = []
    for values in (first, second):
        _, place, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[place.ravel()]
        deviations.append(ranks - ranks.mean())
    scale = np.sqrt(np.prod([np.sum(d**2) for d in deviations]))
    return float(np.sum(deviations[0] * deviations[1]) / scale) if scale > 0.0 else None


def _compose(top: NDArray[np.uint8], below: NDArray[np.uint8], cells: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Lay some cells of one image over another, with soft edges: a hard one would be a defect of its own."""
    weight = cv2.resize(cells.astype(np.float32), top.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., np.newaxis]
    return np.rint(weight * top + (1.0 - weight) * below).astype(np.uint8)


def _batches(pictures: list[NDArray[np.uint8]]) -> list[list[NDArray[np.uint8]]]:
    return [pictures[at : at + _BATCH] for at in range(0, len(pictures), _BATCH)]
