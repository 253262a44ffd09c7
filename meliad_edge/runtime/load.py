"""From a bundle file to something that decides."""

from __future__ import annotations

import datetime
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.device_threshold import with_device_threshold
from meliad_edge.errors import BundleError, EngineError, MissingExtraError, SignatureError
from meliad_edge.keys_folder import keys_folder
from meliad_edge.precision import Precision
from meliad_edge.runtime.choice import EngineChoice
from meliad_edge.runtime.engine import Engine
from meliad_edge.runtime.engine_file import engine_path, read_engine
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.runtime.triton_model import parse_triton_url, served_name

if TYPE_CHECKING:
    from meliad_edge.runtime.tensorrt_engine import TensorRtEngine

_logger = logging.getLogger(__name__)

# The fastest on a GPU first.
_TENSORRT_PRECISIONS: tuple[Precision, ...] = ("fp16", "int8", "fp32")


def load_predictor(
    path: Path,
    *,
    precision: Precision | None = None,
    engine: EngineChoice = "auto",
    threads: int | None = None,
) -> Predictor:
    """Open a bundle on an engine of this machine; :func:`make_predictor` says which.

    Raises:
        BundleError: The bundle cannot be opened, has no graph in that precision, its graph cannot be loaded, or the
            threshold of this device is damaged.
        EngineError: TensorRT was asked for and cannot be used.
        MissingExtraError: TensorRT was asked for and is not installed.
    """
    return make_predictor(
        with_device_threshold(open_trusted(path), path), precision=precision, engine=engine, threads=threads
    )


def make_predictor(
    bundle: Bundle,
    *,
    precision: Precision | None = None,
    engine: EngineChoice = "auto",
    threads: int | None = None,
) -> Predictor:
    """Put a bundle on an engine of this machine.

    Args:
        bundle: The model.
        precision: Which of its graphs; None takes one that an engine was built of, else the bundle's default.
        engine: ``"auto"`` is TensorRT where an engine beside the bundle can be used, else ONNX Runtime.
        threads: Threads of ONNX Runtime; None uses every core.

    Raises:
        BundleError: There is no graph in that precision, or it cannot be loaded.
        EngineError: TensorRT was asked for and cannot be used.
        MissingExtraError: TensorRT was asked for and is not installed.
    """
    carried = [p for p in _TENSORRT_PRECISIONS if p in bundle.models and precision in (p, None)]
    built = [p for p in carried if engine_path(bundle.path, p).is_file()]
    if carried and (engine == "tensorrt" or (engine == "auto" and built)):
        chosen = (built or carried)[0]
        try:
            return Predictor(bundle, load_tensorrt_engine(bundle, chosen), chosen)
        except (EngineError, MissingExtraError) as error:
            if engine == "tensorrt":
                raise
            _logger.warning("%s; ONNX Runtime is used instead", error)
    chosen = precision or bundle.default_precision
    return Predictor(bundle, load_engine(bundle, chosen, threads=threads), chosen)


def load_triton_predictor(path: Path, url: str, *, precision: Precision | None = None) -> Predictor:
    """Open a bundle whose graph a Triton server executes.

    Args:
        path: The bundle.
        url: As :func:`~meliad_edge.runtime.triton_model.parse_triton_url` takes it.
        precision: Which of its graphs the server must have; None takes any of them.

    Raises:
        BundleError: The bundle cannot be opened or has no graph in that precision, or the threshold of this device is
            damaged.
        EngineError: The server cannot be used, or has another model.
        MissingExtraError: Triton's client is not installed.
        UsageError: The address is not one of a Triton server.
    """
    address = parse_triton_url(url)
    for package, distribution in (("tritonclient", "tritonclient"), ("grpc", "grpcio")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(distribution, "triton")
    from meliad_edge.runtime.triton_engine import TritonEngine

    bundle = with_device_threshold(open_trusted(path), path)
    if precision is not None:
        require_precision(bundle, precision)
    precisions = {bundle.model_sha256(p): p for p in bundle.models if precision in (p, None)}
    manifest = bundle.manifest
    engine = TritonEngine(
        address, served_name(manifest.name), precisions, input_hw=manifest.input_hw, grid_hw=manifest.grid_hw
    )
    return Predictor(bundle, engine, precisions[engine.model_sha256])


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
    """ONNX Runtime with one of the bundle's graphs.

    Raises:
        BundleError: There is no graph in that precision, it cannot be loaded, or it takes frames of another size than
            the manifest says.
    """
    require_precision(bundle, precision)
    engine = OnnxRuntimeEngine(bundle.models[precision], threads=threads)
    _require_input_size(bundle, engine)
    return engine


def load_tensorrt_engine(bundle: Bundle, precision: Precision) -> TensorRtEngine:
    """TensorRT with the engine that was built beside the bundle from one of its graphs.

    Raises:
        EngineError: There is no GPU, or no engine of this model for this machine.
        MissingExtraError: PyCUDA or TensorRT is not installed.
    """
    from meliad_edge.runtime.cuda import Device
    from meliad_edge.runtime.tensorrt_build import engine_key, open_tensorrt
    from meliad_edge.runtime.tensorrt_engine import TensorRtEngine

    device = Device()
    tensorrt = open_tensorrt()
    key = engine_key(tensorrt, device, bundle.model_sha256(precision), precision)
    engine = TensorRtEngine(device, tensorrt, read_engine(bundle.path, key))
    _require_input_size(bundle, engine)
    return engine


def load_built_engines(bundle: Bundle) -> dict[Precision, TensorRtEngine]:
    """The TensorRT engines beside a bundle, by precision; one that cannot be used is named in a warning."""
    engines: dict[Precision, TensorRtEngine] = {}
    for precision in bundle.models:
        if engine_path(bundle.path, precision).is_file():
            try:
                engines[precision] = load_tensorrt_engine(bundle, precision)
            except (EngineError, MissingExtraError) as error:
                _logger.warning("TensorRT %s is not checked: %s", precision, error)
    return engines


def require_precision(bundle: Bundle, precision: Precision) -> None:
    """Refuse a precision that a bundle does not carry.

    Raises:
        BundleError: It carries no graph in that precision.
    """
    if precision not in bundle.models:
        carried = ", ".join(bundle.models)
        msg = f"the bundle carries no {precision} graph, only {carried}; export it with --precision {precision}"
        raise BundleError(msg)


def _require_input_size(bundle: Bundle, engine: Engine) -> None:
    if engine.input_size_hw != bundle.manifest.input_hw:
        theirs, ours = engine.input_size_hw, bundle.manifest.input_hw
        msg = f"the graph takes frames of {theirs} pixels, the manifest says {ours}; export the bundle again"
        raise BundleError(msg)
