"""What every detector of the family has in common: fit on images, give a network that scores frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from meliad_edge.errors import UsageError
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor
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

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of every image in pixels."""
        return self.normal.shape[1], self.normal.shape[2]


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
    """Frames to raw scores: what a detector trains, and what is exported."""

    def __init__(self, input_hw: tuple[int, int]) -> None:
        super().__init__()
        self.input_hw = input_hw

    @property
    @abstractmethod
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the map."""

    @property
    @abstractmethod
    def top_cells(self) -> int | None:
        """Cells of the map whose mean, plus ``score_offset``, is the score (the by-design property).

        None where a published method computes its score in another way.
        """

    @property
    def score_offset(self) -> float:
        """Constant b0 between the scale of the map and that of the score."""
        return 0.0

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


class FrozenBackboneNetwork(DetectorNetwork):
    """A network that scores the feature maps of a backbone it shares with others and never changes."""

    def __init__(self, backbone: Backbone, input_hw: tuple[int, int]) -> None:
        super().__init__(input_hw)
        self.backbone = backbone

    @property
    def grid_hw(self) -> tuple[int, int]:
        """The grid of the finest level."""
        stride = self.backbone.strides[0]
        return self.input_hw[0] // stride, self.input_hw[1] // stride

    @abstractmethod
    def score_levels(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Score feature maps, one [N, C, h, w] per stride of the backbone; returns what :meth:`forward` does."""

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score uint8 frames [N, H, W, 3]."""
        return self.score_levels(self.backbone(frames))


def no_prototypes(evidence: Tensor) -> Tensor:
    """What a network without prototypes returns as nearest: -1, int64 [N, 2, h, w] for a map [N, h, w]."""
    absent = torch.full_like(evidence, -1, dtype=torch.int64)
    return torch.stack([absent, absent], dim=1)


class PrototypeNetwork(FrozenBackboneNetwork):
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
    def embed(self, levels: tuple[Tensor, ...]) -> Tensor:
        """Feature maps to patch embeddings [N, D, h, w]."""

    def score_levels(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Score feature maps; see :func:`~meliad_edge.models.scoring.patch_entropy_score`."""
        return patch_entropy_score(self.embed(levels), self.prototypes, self.direction, self.scoring)


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


class Detector(ABC):
    """One method of the family: a frozen dataclass whose fields are its options."""

    # Of the feature maps it is fitted on; empty for a method without a pretrained backbone.
    strides: ClassVar[tuple[int, ...]]
    # Whether the backbone gets images of equal brightness.
    even_light: ClassVar[bool] = False

    @abstractmethod
    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Train on normal images and a few labelled anomalies.

        Args:
            images: What to learn from.
            features: The pretrained backbone, and its feature maps of images.
            seed: Of everything random.
        """

    @abstractmethod
    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> DetectorNetwork:
        """Rebuild a fitted network from its tensors and what it said of itself in ``describe``."""


_REGISTRY: dict[str, type[Detector]] = {}


def register(name: str) -> Callable[[type[Detector]], type[Detector]]:
    """Class decorator that makes a detector available under a name."""

    def add(detector: type[Detector]) -> type[Detector]:
        _REGISTRY[name] = detector
        return detector

    return add


def detector_names() -> list[str]:
    """Names of all registered detectors."""
    return sorted(_REGISTRY)


def create_detector(name: str, options: Mapping[str, Any] | None = None) -> Detector:
    """The detector of that name.

    Args:
        name: One of :func:`detector_names`.
        options: Values for some of its fields; texts are converted.

    Raises:
        UsageError: There is no such detector or option, or a value does not fit.
    """
    if name not in _REGISTRY:
        msg = f"detector {name!r} is unknown; choose one of {', '.join(detector_names())}"
        raise UsageError(msg)
    detector = _REGISTRY[name]
    known = [field.name for field in fields(detector)]  # type: ignore[arg-type]
    for key in options or {}:
        if key not in known:
            msg = f"{name} has no option {key!r}; it has {', '.join(known) or 'none'}"
            raise UsageError(msg)
    try:
        return TypeAdapter(detector).validate_python(dict(options or {}))
    except ValidationError as error:
        problem = error.errors()[0]
        msg = f"{name}: option {problem['loc'][0]} = {problem['input']!r} is not allowed: {problem['msg'].lower()}"
        raise UsageError(msg) from error
