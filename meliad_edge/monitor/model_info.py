"""Which model is at work, as the page and the metrics name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meliad_edge.runtime.predictor import Predictor


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What tells one model at work from another.

    Attributes:
        name: Name in its manifest.
        version: Its release, from the manifest.
        sha256: Digest of the graph that decides.
        engine: What runs it.
        precision: In which precision.
    """

    name: str
    version: int
    sha256: str
    engine: str
    precision: str

    @classmethod
    def of(cls, predictor: Predictor) -> ModelInfo:
        """The model of a predictor."""
        manifest = predictor.bundle.manifest
        return cls(manifest.name, manifest.version, predictor.model_sha256, predictor.engine.name, predictor.precision)
