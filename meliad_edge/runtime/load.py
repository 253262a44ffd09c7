"""From a bundle file to something that decides."""

from __future__ import annotations

from pathlib import Path

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.errors import BundleError
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
    return Predictor(bundle, load_engine(bundle, threads=threads))


def load_engine(bundle: Bundle, *, threads: int | None = None) -> OnnxRuntimeEngine:
    """The engine of this machine with the bundle's graph.

    Raises:
        BundleError: The graph cannot be loaded, or takes frames of another size than the manifest says.
    """
    engine = OnnxRuntimeEngine(bundle.model, threads=threads)
    if engine.input_size_hw != bundle.manifest.input_hw:
        theirs, ours = engine.input_size_hw, bundle.manifest.input_hw
        msg = f"the graph takes frames of {theirs} pixels, the manifest says {ours}; export the bundle again"
        raise BundleError(msg)
    return engine
