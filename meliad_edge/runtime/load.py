"""From a bundle file to something that decides."""

from __future__ import annotations

import datetime
from pathlib import Path

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.device_threshold import with_device_threshold
from meliad_edge.errors import BundleError, SignatureError
from meliad_edge.keys_folder import keys_folder
from meliad_edge.precision import Precision
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from meliad_edge.runtime.predictor import Predictor


def load_predictor(path: Path, *, precision: Precision | None = None, threads: int | None = None) -> Predictor:
    """Open a bundle on the engine of this machine.

    Args:
        path: The ``.meliad`` file.
        precision: Which of its graphs; None takes the bundle's default.
        threads: Threads of the engine; None uses every core.

    Raises:
        BundleError: The bundle cannot be opened, has no graph in that precision, its graph cannot be loaded, or the
            threshold of this device is damaged.
    """
    bundle = with_device_threshold(open_trusted(path), path)
    precision = precision or bundle.default_precision
    return Predictor(bundle, load_engine(bundle, precision, threads=threads), precision)


def open_trusted(path: Path) -> Bundle:
    """Open a bundle if this machine may run it: one that trusts no key runs any, others run what a trusted key signed.

    Raises:
        BundleError: The bundle cannot be opened.
        SignatureError: No trusted key signed it.
    """
    bundle = open_bundle(path)
    if any((keys_folder() / "trusted").glob("*.pub")):  # no cryptography is loaded where there are none
        from meliad_edge.signing import trusted_keys, verify

        try:
            verify(bundle.signed.manifest, bundle.signed.signature, trusted_keys(keys_folder()), datetime.date.today())
        except SignatureError as error:
            raise SignatureError(f"{path}: {error}") from error
    return bundle


def load_engine(bundle: Bundle, precision: Precision, *, threads: int | None = None) -> OnnxRuntimeEngine:
    """The engine of this machine with one of the bundle's graphs.

    Raises:
        BundleError: There is no graph in that precision, it cannot be loaded, or it takes frames of another size than
            the manifest says.
    """
    if precision not in bundle.models:
        carried = ", ".join(bundle.models)
        msg = f"the bundle carries no {precision} graph, only {carried}; export it with --precision {precision}"
        raise BundleError(msg)
    engine = OnnxRuntimeEngine(bundle.models[precision], threads=threads)
    if engine.input_size_hw != bundle.manifest.input_hw:
        theirs, ours = engine.input_size_hw, bundle.manifest.input_hw
        msg = f"the graph takes frames of {theirs} pixels, the manifest says {ours}; export the bundle again"
        raise BundleError(msg)
    return engine
