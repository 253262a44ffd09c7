"""A Gaussian of normal patches for every place of the image [ours, after PaDiM].

PaDiM (Defard et al., 2020) compares a patch with what normal images show at the same place. Four things differ: the
directions are the main ones of whitened features, not random channels; the covariance of a place is pulled towards that
of all places the more, the fewer the images; only its main directions are kept, as in probabilistic PCA (Tipping and
Bishop, 1999), which is quicker and as good; and it is one term of the evidence, not the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from meliad_edge.models.whitening import fit_whitening

DIRECTIONS = 64
MAIN_DIRECTIONS = 24
# Images that the covariance of all places counts for at each place.
PRIOR_IMAGES = 40
_CELLS = 256


@dataclass(frozen=True, slots=True)
class PlaceGaussians:
    """Deviations from what is normal at a place.

    Attributes:
        projection: float32 [d, C], from features to whitened directions.
        mean: Of the projected features at each place, float32 [h, w, d].
        main: Main directions of each place, each as long as its variance exceeds that of the others, see
            :func:`place_deviation`: float32 [h * w, d, k].
        precision: One over the variance in all other directions, float32 [h * w].
    """

    projection: NDArray[np.float32]
    mean: NDArray[np.float32]
    main: NDArray[np.float32]
    precision: NDArray[np.float32]

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mahalanobis distances of features [n, h, w, C], [n, h, w]."""
        main, precision = torch.from_numpy(self.main), torch.from_numpy(self.precision)
        rows = [torch.from_numpy(self.deviations(image)).flatten(0, 1) for image in features]
        distances = torch.cat([place_deviation(image.unsqueeze(1), main, precision) for image in rows], dim=1)
        return np.asarray(distances.T.numpy()).reshape(features.shape[:3])

    def deviations(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """From the mean of a place, in whitened directions: of features [..., h, w, C], [..., h, w, d]."""
        return np.asarray(features @ self.projection.T - self.mean)


def place_features(levels: Sequence[Tensor]) -> Tensor:
    """Features of strides 8 and 16 on the grid of the latter, [N, sum of C, h, w].

    Unlike those of the metric they are not averaged with their neighbours: a deviation is to stay where it is.
    """
    finer, fine = levels
    return torch.cat([functional.avg_pool2d(finer, 2), fine], dim=1)


def place_deviation(deviations: Tensor, main: Tensor, precision: Tensor) -> Tensor:
    """Mahalanobis distances, sqrt(precision (|r|^2 - |main' r|^2)), for deviations r from the mean of a place.

    With variances v_i in the main directions u_i and v in all others, main holds sqrt(1 - v / v_i) u_i, precision 1/v.

    Args:
        deviations: [places, N, d].
        main: [places, d, k].
        precision: [places].

    Returns:
        [places, N].
    """
    length = _square_length(deviations) - _square_length(deviations @ main)
    return (length.clamp_min(0.0) * precision.unsqueeze(1)).sqrt()


def _square_length(vectors: Tensor) -> Tensor:
    """By a product with ones: ONNX Runtime takes powers, and sums over an axis, several times slower."""
    squares = (vectors * vectors).flatten(0, 1)
    return (squares @ squares.new_ones(squares.shape[1], 1)).view(vectors.shape[:2])


def fit_places(features: NDArray[np.float32]) -> PlaceGaussians:
    """Estimate the Gaussians.

    With n images, their deviations r from the mean of a place, and whitened directions, in which the covariance of all
    places is the identity I (less what shrinkage takes), that of a place is
    (sum of r r' + PRIOR_IMAGES I) / (n - 1 + PRIOR_IMAGES). The variance in the directions that are not kept is the
    harmonic mean of theirs.

    Args:
        features: Of normal images, float32 [n, h, w, C].
    """
    count, height, width, channels = features.shape
    places = height * width
    depth = min(DIRECTIONS, channels)
    kept = min(MAIN_DIRECTIONS, depth - 1)
    projection = fit_whitening(features.reshape(-1, channels)).main_directions(depth).matrix
    projected = features.reshape(count, places, channels) @ projection.T
    mean = projected.mean(axis=0)
    deviations = torch.from_numpy(projected - mean).permute(1, 2, 0)  # [places, d, n]
    main, precision = torch.empty(places, depth, kept), torch.empty(places)
    for start in range(0, places, _CELLS):
        part = slice(start, start + _CELLS)
        some = deviations[part].double()
        covariance = some @ some.transpose(1, 2)
        covariance.diagonal(dim1=1, dim2=2).add_(PRIOR_IMAGES)
        variances, vectors = torch.linalg.eigh(covariance / (count - 1 + PRIOR_IMAGES))  # ascending
        others, kept_variances = variances.split([depth - kept, kept], dim=1)
        precision_of_others = others.reciprocal().mean(1)
        excess = 1.0 - 1.0 / (precision_of_others.unsqueeze(1) * kept_variances)
        # Where all variances are the same, rounding may put it below 0.
        main[part] = (vectors[:, :, depth - kept :] * excess.clamp_min(0.0).sqrt().unsqueeze(1)).float()
        precision[part] = precision_of_others.float()
    return PlaceGaussians(projection, mean.reshape(height, width, depth), main.numpy(), precision.numpy())
