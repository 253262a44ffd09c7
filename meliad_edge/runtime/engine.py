"""The one interface between a model and everything that uses it, whatever library executes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meliad_edge.progress import track


@dataclass(frozen=True, slots=True)
class RawScores:
    """What the exported graph returns for a batch, before any threshold.

    Attributes:
        score: float32 [N]; higher is more anomalous, unbounded.
        map: float32 [N, H, W]; evidence per grid cell. The mean of each map's ``top_cells`` largest
            cells, plus a constant of the model, is its score (the by-design property), unless the model's
            ``top_cells`` is None.
        nearest: int64 [N, 2, H, W]; per cell the index of the nearest prototype of the normal class (plane 0) and
            of the anomaly class (plane 1). -1 in a model without prototypes; a model that has seen no defect names
            the one placeholder row of its anomaly class, which has no exemplar.
    """

    score: NDArray[np.float32]
    map: NDArray[np.float32]
    nearest: NDArray[np.int64]


class Engine(Protocol):
    """A loaded model that scores frames of one fixed size."""

    @property
    def name(self) -> str:
        """What executes the model, for reports; for example ``"onnxruntime-cpu+kernel"``."""
        ...

    @property
    def input_size_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that :meth:`infer` takes."""
        ...

    def infer(self, frames: NDArray[np.uint8]) -> RawScores:
        """Score a batch of RGB frames, uint8 [N, H, W, 3] at :attr:`input_size_hw`."""
        ...


def infer_all(engine: Engine, frames: NDArray[np.uint8], description: str, batch_size: int = 16) -> RawScores:
    """Score any number of frames in batches, with a progress bar.

    Args:
        engine: What executes the model.
        frames: uint8 RGB [n, H, W, 3], n > 0.
        description: Label of the progress bar.
        batch_size: Frames per call.
    """
    starts = range(0, len(frames), batch_size)
    parts = [engine.infer(frames[start : start + batch_size]) for start in track(starts, description)]
    return RawScores(
        np.concatenate([part.score for part in parts]),
        np.concatenate([part.map for part in parts]),
        np.concatenate([part.nearest for part in parts]),
    )
