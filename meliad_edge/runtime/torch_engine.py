"""The reference engine: the trained network in PyTorch. Workshop only; no other runtime module imports torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import DetectorNetwork, FrozenBackboneNetwork, PrototypeNetwork
from meliad_edge.models.scoring_kernel import fused_patch_entropy_score
from meliad_edge.runtime.engine import RawScores


class TorchEngine:
    """Scores frames with the network that was trained.

    Args:
        network: The network.
        feature_cache: Folder with feature maps of images, used where the backbone is frozen.
        use_kernel: Score with our compiled kernel where the network scores with prototypes and there is one.
    """

    name = "pytorch"

    def __init__(
        self, network: DetectorNetwork, feature_cache: Path | None = None, *, use_kernel: bool = False
    ) -> None:
        self._network = network.eval()
        self._use_kernel = use_kernel
        self._features: FeatureExtractor | None = None
        if feature_cache is not None and isinstance(network, FrozenBackboneNetwork):
            self._features = FeatureExtractor(network.backbone, feature_cache)

    @property
    def input_size_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that :meth:`infer` takes."""
        return self._network.input_hw

    def infer(self, frames: NDArray[np.uint8]) -> RawScores:
        """Score a batch of RGB frames, uint8 [N, H, W, 3]."""
        with torch.inference_mode():
            score, evidence, nearest = self._score(frames)
        return RawScores(score.numpy(), evidence.numpy(), nearest.numpy())

    def _score(self, frames: NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor]:
        network = self._network
        if not isinstance(network, FrozenBackboneNetwork):
            score, evidence, nearest = network(torch.from_numpy(frames))
            return score, evidence, nearest
        if self._features is None:
            levels = network.backbone(torch.from_numpy(frames))
        else:
            levels = tuple(torch.from_numpy(level) for level in self._features.levels_of_batch(frames))
        if self._use_kernel and isinstance(network, PrototypeNetwork):
            return fused_patch_entropy_score(
                network.embed(levels), network.prototypes, network.direction, network.scoring
            )
        return network.score_levels(levels)
