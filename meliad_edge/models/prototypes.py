"""Prototypes of patches, and the training patch that stands for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

_SAMPLE = 30_000
_ITERATIONS = 10
_CHUNK = 8192


def choose_prototypes(patches: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """Centres of k-means over (a sample of) patches; the patches themselves when there are no more than ``count``.

    Args:
        patches: float32 [n, D].
        count: Prototypes wanted.
        seed: Seed of the sample and of k-means.

    Returns:
        float32 [min(n, count), D].
    """
    if len(patches) <= count:
        return patches.copy()
    rng = np.random.default_rng(seed)
    if len(patches) > _SAMPLE:
        patches = patches[rng.choice(len(patches), _SAMPLE, replace=False)]
    # Random starts are as good here as k-means++, which takes longer than all the iterations.
    means = KMeans(count, init="random", n_init=1, max_iter=_ITERATIONS, random_state=seed)
    return np.asarray(means.fit(patches).cluster_centers_, dtype=np.float32)


def squared_distances(patches: NDArray[np.float32], prototypes: NDArray[np.float32]) -> NDArray[np.float32]:
    """|z - p|^2 for every pair, [n, K], clipped at 0."""
    squared = -2.0 * (patches @ prototypes.T)
    squared += np.square(patches).sum(axis=1, keepdims=True)
    squared += np.square(prototypes).sum(axis=1)
    np.maximum(squared, 0.0, out=squared)
    return squared


def nearest_distance(patches: NDArray[np.float32], prototypes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean distance to the nearest prototype; patches [..., D] give [...]."""
    flat = patches.reshape(-1, patches.shape[-1])
    result = np.empty(len(flat), np.float32)
    for start in range(0, len(flat), _CHUNK):
        result[start : start + _CHUNK] = squared_distances(flat[start : start + _CHUNK], prototypes).min(axis=1)
    return np.sqrt(result).reshape(patches.shape[:-1])


def nearest_patch(prototypes: NDArray[np.float32], patches: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index of the patch nearest to each prototype, [K]."""
    best = np.full(len(prototypes), np.inf, np.float32)
    index = np.zeros(len(prototypes), np.int64)
    for start in range(0, len(patches), _CHUNK):
        squared = squared_distances(patches[start : start + _CHUNK], prototypes)
        closest = squared.argmin(axis=0)
        value = squared[closest, np.arange(len(prototypes))]
        better = value < best
        best[better], index[better] = value[better], closest[better] + start
    return index
