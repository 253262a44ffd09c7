"""Prototypes of patches, and the training patch that stands for each."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SAMPLE = 30_000
_ITERATIONS = 10
_CHUNK = 8192


def choose_prototypes(patches: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """Centres of k-means over (a sample of) patches; the patches themselves when there are no more than ``count``.

    Lloyd's iterations from random patches: as good here as k-means++, which takes longer than all the iterations.

    Args:
        patches: float32 [n, D].
        count: Prototypes wanted.
        seed: Seed of the sample and of the first centres.

    Returns:
        float32 [min(n, count), D].
    """
    if len(patches) <= count:
        return patches.copy()
    rng = np.random.default_rng(seed)
    sample = torch.from_numpy(patches[rng.permutation(len(patches))[:_SAMPLE]])
    centres = sample[:count].clone()
    for _ in range(_ITERATIONS):
        nearest = torch.cat([_squared(part, centres).argmin(dim=1) for part in torch.split(sample, _CHUNK)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        sizes = torch.bincount(nearest, minlength=count).unsqueeze(1)
        # A centre that has lost all its patches stays where it is.
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return np.asarray(centres.numpy(), dtype=np.float32)


def nearest_distance(patches: NDArray[np.float32], prototypes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean distance to the nearest prototype; patches [..., D] give [...]."""
    flat = torch.from_numpy(patches.reshape(-1, patches.shape[-1]))
    of = torch.from_numpy(prototypes)
    nearest = torch.cat([_squared(part, of).min(dim=1).values for part in torch.split(flat, _CHUNK)])
    return np.asarray(nearest.sqrt().numpy(), dtype=np.float32).reshape(patches.shape[:-1])


def nearest_patch(prototypes: NDArray[np.float32], patches: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index of the patch nearest to each prototype, [K]."""
    of = torch.from_numpy(prototypes)
    best = torch.full((len(of),), torch.inf)
    index = torch.zeros(len(of), dtype=torch.int64)
    for number, part in enumerate(torch.split(torch.from_numpy(patches), _CHUNK)):
        value, closest = _squared(part, of).min(dim=0)
        better = value < best
        best[better], index[better] = value[better], closest[better] + number * _CHUNK
    return np.asarray(index.numpy(), dtype=np.int64)


def _squared(patches: Tensor, prototypes: Tensor) -> Tensor:
    norms = patches.square().sum(dim=1, keepdim=True) + prototypes.square().sum(dim=1)
    return torch.addmm(norms, patches, prototypes.T, alpha=-2.0).clamp_min_(0.0)
