"""A linear metric in which the normal patches have unit variance in every direction."""

from __future__ import annotations

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
        matrix: float32 [D, C], of ascending variance; D = C until directions are left out.
    """

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    def main_directions(self, count: int) -> Whitening:
        """The ``count`` directions of largest variance only."""
        return Whitening(self.mean, self.matrix[-count:].copy())

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whiten patches [..., C], to [..., D]."""
        return np.asarray((torch.from_numpy(patches - self.mean) @ torch.from_numpy(self.matrix).T).numpy())


def fit_whitening(patches: NDArray[np.float32], shrinkage: float = SHRINKAGE) -> Whitening:
    """Estimate the whitening of normal patches, in float64.

    Args:
        patches: float32 [n, C].
        shrinkage: Share of the mean eigenvalue added to all.
    """
    channels = patches.shape[1]
    origin = patches[:_CHUNK].mean(axis=0, dtype=np.float64).astype(np.float32)
    total, products = np.zeros(channels), np.zeros((channels, channels))
    for start in range(0, len(patches), _CHUNK):
        centred = torch.from_numpy(patches[start : start + _CHUNK] - origin)
        total += centred.sum(dim=0, dtype=torch.float64).numpy()
        products += (centred.T @ centred).numpy()
    mean = total / len(patches)
    eigenvalues, vectors = np.linalg.eigh(products / len(patches) - np.outer(mean, mean))
    eigenvalues = np.maximum(eigenvalues, 0.0)
    scale = 1.0 / np.sqrt(eigenvalues + shrinkage * eigenvalues.mean() + 1e-12)
    return Whitening((origin + mean).astype(np.float32), (vectors * scale).T.astype(np.float32))
