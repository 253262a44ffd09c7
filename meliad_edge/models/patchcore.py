"""PatchCore: a memory bank of normal patches and the distance to the nearest of them (Roth et al., CVPR 2022).

As in the paper [paper]: locally aware patches of two middle levels, a greedy k-center coreset chosen under a random
projection, the distance to the nearest bank entry per patch, and the re-weighted image score of equation 7. As in the
authors' code and in anomalib [code]: cells outside the image count as zeros in the 3x3 average, so cells at the border
have shorter features and rarely are the farthest from the bank. The bound on the bank, the sample its entries are
chosen from, and a map that is left on the grid and unsmoothed, so that it shows what the score was taken from, are
[ours]; anomalib enlarges its map to the image and smooths it (sigma of 4 pixels), which leaves the score as it is.
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

from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor, patch_features
from meliad_edge.models.network import (
    Detector,
    FittedDetector,
    FrozenBackboneNetwork,
    TrainingImages,
    no_prototypes,
    register,
)
from meliad_edge.progress import track

# Patches that the coreset is chosen from; choosing 10,000 of them takes a minute of one core.
CANDIDATES = 100_000
# Depth of the random projection that the coreset is chosen under [code].
PROJECTED_DEPTH = 128
_BATCH = 16
# Bank entries compared at once: the distances of all cells of an image to them stay in the cache of a small CPU.
_CHUNK = 1000


class PatchCoreNetwork(FrozenBackboneNetwork):
    """Backbone and memory bank; its bank entries are too many to name, so it has no prototypes.

    Args:
        backbone: Of strides 8 and 16.
        input_hw: Height and width of frames.
        memory_bank: Normal patches, float32 [K, D].
        neighbourhoods: For each bank entry the ``b`` entries nearest to it, itself included, int64 [K, b].
    """

    memory_bank: Tensor
    neighbourhoods: Tensor

    def __init__(
        self, backbone: Backbone, input_hw: tuple[int, int], memory_bank: Tensor, neighbourhoods: Tensor
    ) -> None:
        super().__init__(backbone, input_hw)
        self.register_buffer("memory_bank", memory_bank)
        self.register_buffer("neighbourhoods", neighbourhoods)

    @property
    def top_cells(self) -> int | None:
        """None with re-weighting: the score is then the largest cell times a weight below one."""
        return None if self._reweighted else 1

    def describe(self) -> dict[str, Any]:
        """Nothing: the tensors say it all."""
        return {}

    def score_levels(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Score feature maps of strides 8 and 16; the map [N, H/8, W/8] holds distances, never below the score."""
        features = patch_features(levels, zero_border=True)
        patches = features.flatten(2).transpose(1, 2)  # [N, hw, D]
        distances = nearest_distance(patches, self.memory_bank)
        evidence = distances.view(-1, *features.shape[-2:])
        score = self._reweight(patches, distances) if self._reweighted else distances.amax(1)
        return score, evidence, no_prototypes(evidence)

    @property
    def _reweighted(self) -> bool:
        return self.neighbourhoods.shape[1] > 1

    def _reweight(self, patches: Tensor, distances: Tensor) -> Tensor:
        """Equations 6 and 7: s = (1 - exp|m_test - m*| / sum over m in N_b(m*) of exp|m_test - m|) |m_test - m*|.

        Args:
            patches: [N, hw, D].
            distances: Of each to its nearest bank entry, [N, hw].
        """
        farthest = distances.argmax(1).view(-1, 1, 1).expand(-1, 1, patches.shape[2])
        to_bank = pairwise_squared(patches.gather(1, farthest).squeeze(1), self.memory_bank).sqrt()
        nearest, index = to_bank.min(1)
        to_neighbourhood = to_bank.gather(1, self.neighbourhoods[index])
        weight = 1.0 - torch.exp(nearest - to_neighbourhood.logsumexp(1))
        return weight * distances.amax(1)


def pairwise_squared(patches: Tensor, bank: Tensor) -> Tensor:
    """|x - p|^2 as |x|^2 - 2 xp + |p|^2, for patches [..., D] and a bank [K, D]: [..., K], clipped at 0."""
    products = functional.linear(-2.0 * patches, bank, bank.square().sum(1))
    return (products + patches.square().sum(-1, keepdim=True)).clamp_min(0.0)


def nearest_distance(patches: Tensor, bank: Tensor) -> Tensor:
    """Euclidean distance of patches [..., D] to the nearest entry of a bank [K, D]: [...]."""
    nearest = [pairwise_squared(patches, chunk).amin(-1) for chunk in torch.split(bank, _CHUNK)]
    return torch.stack(nearest).amin(0).sqrt()


@register("patchcore")
@dataclass(frozen=True, slots=True)
class PatchCore(Detector):
    """Keeps a coreset of the normal patches. It learns nothing from labelled defects: shots are ignored.

    Attributes:
        coreset_ratio: Share of all normal patches that the bank keeps.
        max_bank: Bank entries at most; for 256 x 256 pixels 10,000 add 7 MB and 3 GFLOP to the graph.
        neighbours: b of equation 7, 9 as in anomalib [code]; 1 switches the re-weighting off, as in the authors' code.
    """

    coreset_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    max_bank: Annotated[int, Field(ge=1, le=CANDIDATES)] = 10_000
    neighbours: Annotated[int, Field(ge=1)] = 9

    strides: ClassVar[tuple[int, ...]] = (8, 16)

    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Fit on normal images alone; ``images.shots`` is not read.

        The bank is chosen from a seeded sample of at most ``CANDIDATES`` patches of all images, so time and memory
        do not grow with the number of images.
        """
        rng = np.random.default_rng(seed)
        candidates, patch_count = _sample_patches(features, images.normal, rng)
        bank_size = min(max(1, round(self.coreset_ratio * patch_count)), self.max_bank, len(candidates))
        bank = candidates[torch.from_numpy(choose_coreset(candidates.numpy(), bank_size, rng))]
        network = PatchCoreNetwork(
            features.backbone,
            images.size_hw,
            bank,
            nearest_entries(bank, min(self.neighbours, len(bank))),
        )
        facts = {"bank_patches": len(bank), "candidate_patches": len(candidates), "labelled_defects_used": 0}
        return FittedDetector(network.eval(), (), facts)

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> PatchCoreNetwork:
        """Rebuild a fitted network from its tensors."""
        network = PatchCoreNetwork(backbone, input_hw, state["memory_bank"], state["neighbourhoods"])
        network.load_state_dict(state)
        return network


def choose_coreset(patches: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Greedy k-center selection under a random projection (algorithm 1): each time the patch farthest from the chosen.

    Args:
        patches: float32 [n, D]; projected to ``PROJECTED_DEPTH`` dimensions where D is larger.
        count: Patches wanted, at most n.
        rng: Of the projection and of the first patch.

    Returns:
        Indices in the order of choice, int64 [count].
    """
    if patches.shape[1] > PROJECTED_DEPTH:
        projection = rng.standard_normal((patches.shape[1], PROJECTED_DEPTH)).astype(np.float32)
        patches = patches @ projection / np.float32(np.sqrt(PROJECTED_DEPTH))
    squared_lengths = np.square(patches).sum(axis=1)
    chosen = np.empty(count, np.int64)
    chosen[0] = rng.integers(len(patches))
    gap = np.full(len(patches), np.inf, np.float32)  # squared distance to the nearest chosen patch
    for step in track(range(1, count), "choosing the bank"):
        last = chosen[step - 1]
        squared = squared_lengths - 2.0 * (patches @ patches[last]) + squared_lengths[last]
        np.minimum(gap, squared, out=gap)
        gap[last] = -np.inf  # rounding must not choose a patch twice
        chosen[step] = gap.argmax()
    return chosen


def nearest_entries(bank: Tensor, count: int) -> Tensor:
    """For each entry of a bank [K, D] the ``count`` entries nearest to it, itself included: int64 [K, count]."""
    chunks = torch.split(bank, _CHUNK)
    return torch.cat([pairwise_squared(chunk, bank).topk(count, dim=1, largest=False).indices for chunk in chunks])


def _sample_patches(
    features: FeatureExtractor, frames: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[Tensor, int]:
    """At most ``CANDIDATES`` patches [n, D] of the frames, and how many patches the frames have."""
    stride = features.backbone.strides[0]
    cells = (frames.shape[1] // stride) * (frames.shape[2] // stride)
    total = len(frames) * cells
    kept = np.sort(rng.choice(total, min(total, CANDIDATES), replace=False))
    sample = torch.empty(len(kept), sum(features.backbone.channels))
    for start in track(range(0, len(frames), _BATCH), "features of normals"):
        levels = features.levels_of_batch(frames[start : start + _BATCH])
        patches = patch_features([torch.from_numpy(level) for level in levels], zero_border=True)
        patches = patches.permute(0, 2, 3, 1).flatten(0, 2)
        first, last = np.searchsorted(kept, (start * cells, start * cells + len(patches)))
        sample[first:last] = patches[torch.from_numpy(kept[first:last] - start * cells)]
    return sample, total
