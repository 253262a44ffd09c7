"""From a bundle file to something that decides."""

from __future__ import annotations

from pathlib import Path

from meliad_edge.bundle import open_bundle
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from meliad_edge.runtime.predictor import Predictor


def load_predictor(path: Path, *, threads: int | None = None) -> Predictor:
    """Open a bundle on the engine of this machine.

    Args:
        path: The ``.meliad`` file.
        threads: Threads of the engine; None uses every core.

    Raises:
        BundleError: The bundle cannot be opened, or its graph cannot be loaded.
    """
    bundle = open_bundle(path)
    return Predictor(bundle, OnnxRuntimeEngine(bundle.model, threads=threads))
