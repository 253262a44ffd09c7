"""A linear metric in which the normal patches have unit variance in every direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# Share of the mean eigenvalue added to every eigenvalue, so that directions without data stay bounded.
SHRINKAGE = 0.03
_CHUNK = 65536


@dataclass(frozen=True, slots=True)
class Whitening:
    """z = matrix (x - mean), with Euclidean distances in z equal to shrunk Mahalanobis distances in x.

    Attributes:
        mean: float32 [C].
        matrix: float32 [C, C].
    """

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whiten patches [..., C]."""
        return np.asarray((torch.from_numpy(patches - self.mean) @ torch.from_numpy(self.matrix).T).numpy())


def fit_whitening(
    patches: NDArray[np.float32],
    shrinkage: float = SHRINKAGE,
    *,
    levels: Sequence[tuple[int, float]] | None = None,
) -> Whitening:
    """Estimate the whitening of normal patches, in float64.

    Channels may come in levels: each is whitened as far as the levels before it do not tell it already, and then
    weighted. With all weights 1 the distances are those of the whole covariance, whatever the levels. [ours]

    Args:
        patches: float32 [n, C].
        shrinkage: Share of the mean eigenvalue added to all.
        levels: Number of channels and weight of each level; None for one level.
    """
    channels = patches.shape[1]
    origin = patches[:_CHUNK].mean(axis=0, dtype=np.float64).astype(np.float32)
    total, products = np.zeros(channels), np.zeros((channels, channels))
    for start in range(0, len(patches), _CHUNK):
        centred = torch.from_numpy(patches[start : start + _CHUNK] - origin)
        total += centred.sum(dim=0, dtype=torch.float64).numpy()
        products += (centred.T @ centred).numpy()
    mean = total / len(patches)
    covariance = products / len(patches) - np.outer(mean, mean)
    covariance += (shrinkage * np.trace(covariance) / channels + 1e-12) * np.eye(channels)
    matrix, start = np.zeros((channels, channels)), 0
    for count, weight in levels or ((channels, 1.0),):
        end = start + count
        told = np.linalg.solve(covariance[:start, :start], covariance[:start, start:end]).T
        residual = covariance[start:end, start:end] - told @ covariance[:start, start:end]
        scale = weight * _inverse_root(residual)
        matrix[start:end, :start], matrix[start:end, start:end] = -scale @ told, scale
        start = end
    return Whitening((origin + mean).astype(np.float32), matrix.astype(np.float32))


def _inverse_root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    eigenvalues, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors / np.sqrt(np.maximum(eigenvalues, 1e-12))) @ vectors.T)
