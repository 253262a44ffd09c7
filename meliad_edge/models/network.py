"""What every detector of the family has in common: fit on images, give a network that scores frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from meliad_edge.errors import UsageError
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.scoring import ScoringParameters, patch_entropy_score


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """The images a detector is fitted on, at model size.

    Attributes:
        normal: uint8 RGB [n, H, W, 3].
        shots: uint8 RGB [m, H, W, 3], the labelled anomalies; m may be 0.
    """

    normal: NDArray[np.uint8]
    shots: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PatchSite:
    """Where in the training images the patch nearest to a prototype is.

    Attributes:
        kind: Which array of :class:`TrainingImages`.
        image: Index into that array.
        cell: Row and column in the grid.
    """

    kind: Literal["normal", "shots"]
    image: int
    cell: tuple[int, int]


class DetectorNetwork(nn.Module, ABC):
    """Frames to raw scores: what a detector trains, and what is exported.

    Subclasses keep the by-design property: the mean of a map's ``top_cells`` largest cells plus
    ``score_offset`` is the image's score.
    """

    def __init__(self, backbone: Backbone, input_hw: tuple[int, int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.input_hw = input_hw
        self.grid_hw = (input_hw[0] // 16, input_hw[1] // 16)

    @property
    @abstractmethod
    def top_cells(self) -> int:
        """Cells of the map whose mean is the score."""

    @property
    @abstractmethod
    def score_offset(self) -> float:
        """Constant b0 added to that mean."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What :meth:`Detector.build` needs beside the tensors; JSON values."""

    @abstractmethod
    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score frames.

        Args:
            frames: uint8 RGB [N, H, W, 3].

        Returns:
            Score [N], map [N, h, w], and nearest [N, 2, h, w] int64: per cell the nearest prototype of the normal
            and of the anomaly class, -1 for a network without prototypes.
        """


class PrototypeNetwork(DetectorNetwork):
    """A network whose last step is the fused scoring node: embeddings against prototypes of both classes.

    Subclasses compute embeddings and hold ``prototypes`` [K, D], ``direction`` [D] and ``scoring``.
    """

    prototypes: Tensor
    direction: Tensor
    scoring: ScoringParameters

    @property
    def top_cells(self) -> int:
        """Cells of the map whose mean is the score."""
        return self.scoring.top_cells

    @property
    def score_offset(self) -> float:
        """Constant b0 added to that mean."""
        return self.scoring.offset

    def describe(self) -> dict[str, Any]:
        """The scalars of the scoring."""
        return asdict(self.scoring)

    @abstractmethod
    def embed(self, frames: Tensor) -> Tensor:
        """uint8 frames [N, H, W, 3] to patch embeddings [N, D, h, w]."""

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score frames; see :func:`~meliad_edge.models.scoring.patch_entropy_score`."""
        return patch_entropy_score(self.embed(frames), self.prototypes, self.direction, self.scoring)


@dataclass(frozen=True, slots=True)
class FittedDetector:
    """A trained network and the training patches behind its prototypes.

    Attributes:
        network: In evaluation mode.
        sites: One per prototype, in the order of the prototypes; may be empty.
        facts: What fitting chose by itself, for reports; JSON values.
    """

    network: DetectorNetwork
    sites: tuple[PatchSite, ...]
    facts: dict[str, Any]


class Detector(Protocol):
    """One method of the family."""

    def fit(self, images: TrainingImages, backbone: Backbone, *, seed: int) -> FittedDetector:
        """Train on normal images and a few labelled anomalies."""
        ...

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> DetectorNetwork:
        """Rebuild a fitted network from its tensors and what it said of itself in ``describe``."""
        ...


_REGISTRY: dict[str, Callable[[], Detector]] = {}


def register(name: str) -> Callable[[type[Detector]], type[Detector]]:
    """Class decorator that makes a detector available under a name."""

    def add(detector: type[Detector]) -> type[Detector]:
        _REGISTRY[name] = detector
        return detector

    return add


def create_detector(name: str) -> Detector:
    """The detector of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in _REGISTRY:
        msg = f"detector {name!r} is unknown; choose one of {', '.join(sorted(_REGISTRY))}"
        raise UsageError(msg)
    return _REGISTRY[name]()
