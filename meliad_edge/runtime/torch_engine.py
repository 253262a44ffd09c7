"""The reference engine: the trained network in PyTorch. Workshop only; no other runtime module imports torch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from meliad_edge.models.network import DetectorNetwork
from meliad_edge.runtime.engine import RawScores


class TorchEngine:
    """Scores frames with the network that was trained."""

    name = "pytorch"

    def __init__(self, network: DetectorNetwork) -> None:
        self._network = network.eval()

    @property
    def input_size_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that :meth:`infer` takes."""
        return self._network.input_hw

    def infer(self, frames: NDArray[np.uint8]) -> RawScores:
        """Score a batch of RGB frames, uint8 [N, H, W, 3]."""
        with torch.inference_mode():
            score, evidence, nearest = self._network(torch.from_numpy(frames))
        return RawScores(score.numpy(), evidence.numpy(), nearest.numpy())
