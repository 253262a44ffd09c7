"""Building TensorRT engines on the machine that runs them; whatever differs between TensorRT's versions is here.

TensorRT 10.3 (JetPack 6) takes typed networks when asked to, TensorRT 11 takes nothing else: the precision is that of
the graph. ``trt`` is the module ``tensorrt`` throughout; TensorRT for RTX, which builds without a GPU, can stand in.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meliad_edge.errors import EngineError, MissingExtraError
from meliad_edge.precision import Precision
from meliad_edge.runtime.cuda import Device
from meliad_edge.runtime.engine_file import EngineKey, write_atomically
from meliad_edge.runtime.kernel_library import find_kernel_library

_logger = logging.getLogger(__name__)

MIN_VERSION = (10, 3)
_PLUGIN = ("PatchEntropyScore", "1", "")


@dataclass(frozen=True, slots=True)
class TensorRt:
    """TensorRT as it is installed, with our plugin loaded.

    Attributes:
        trt: The module.
        logger: Passes on what TensorRT says, and keeps its errors.
        plugin: The library of the plugin.
    """

    trt: Any
    logger: Any
    plugin: Path

    def failure(self, doing: str) -> EngineError:
        """The error for something that TensorRT could not do, with its own words."""
        # The first is the cause; what follows is where the parser was when it happened.
        said = self.logger.errors[0] if self.logger.errors else "it does not say why"
        self.logger.errors.clear()
        msg = f"TensorRT {self.trt.__version__} cannot {doing} ({said}); see: meliad-edge doctor"
        return EngineError(msg)


def open_tensorrt() -> TensorRt:
    """Import TensorRT and load the plugin; a GPU must have been found before, TensorRT crashes without one.

    Raises:
        MissingExtraError: It is not installed.
        EngineError: It is too old or broken, or the plugin was not built or cannot be loaded.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingExtraError("tensorrt", "tensorrt")
    try:
        import tensorrt
    except ImportError as error:
        msg = f"TensorRT cannot be imported ({error}); install it again, or use --engine onnxruntime"
        raise EngineError(msg) from error
    if tuple(int(part) for part in re.findall(r"\d+", tensorrt.__version__)[:2]) < MIN_VERSION:
        oldest = ".".join(map(str, MIN_VERSION))
        msg = f"TensorRT {tensorrt.__version__} is too old, {oldest} (JetPack 6) is needed; update it"
        raise EngineError(msg)
    return with_plugin(tensorrt, find_kernel_library("tensorrt"))


def with_plugin(trt: Any, library: Path | None) -> TensorRt:
    """Load the plugin into a TensorRT.

    Raises:
        EngineError: There is no library, or TensorRT refuses it.
    """
    if library is None:
        msg = "the TensorRT plugin was not built; in a checkout, with nvcc: pip install . (see: meliad-edge doctor)"
        raise EngineError(msg)
    tensorrt = TensorRt(trt, _logger_class(trt)(), library)
    if not _load_once(trt, library):
        raise tensorrt.failure(f"load {library}")
    return tensorrt


def engine_key(tensorrt: TensorRt, device: Device, model_sha256: str, precision: Precision) -> EngineKey:
    """What an engine depends on that is built here and now."""
    gpu = device.gpu
    return EngineKey(
        model_sha256=model_sha256,
        precision=precision,
        tensorrt=tensorrt.trt.__version__,
        cuda=gpu.cuda,
        driver=gpu.driver,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        plugin_sha256=hashlib.sha256(tensorrt.plugin.read_bytes()).hexdigest(),
    )


def timing_cache_path(folder: Path, key: EngineKey) -> Path:
    """Where measured times of layers are kept: one file per TensorRT and GPU, shared by all models of a folder."""
    gpu = re.sub(r"[^a-z0-9]+", "-", key.gpu.lower()).strip("-")
    return folder / f"tensorrt-{key.tensorrt}-{gpu}-sm{key.compute_capability.replace('.', '')}.timing"


def build_engine(
    tensorrt: TensorRt,
    model: bytes,
    *,
    max_batch: int,
    workspace_mb: int,
    timing_cache: Path,
) -> bytes:
    """Build an engine for batches of one to ``max_batch`` frames, fastest for one.

    Args:
        tensorrt: With the plugin.
        model: A graph as :func:`~meliad_edge.export.tensorrt_graph.to_tensorrt` makes it.
        max_batch: Frames of the largest batch.
        workspace_mb: Most device memory in MiB for intermediate results of one layer.
        timing_cache: File that spares repeated measurements, and is updated.

    Raises:
        EngineError: TensorRT refuses the graph or fails to build.
    """
    trt = tensorrt.trt
    builder = trt.Builder(tensorrt.logger)
    # Always on and without effect from TensorRT 11 on.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, tensorrt.logger)
    if not parser.parse(model):
        raise tensorrt.failure("parse the graph")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    # FP32 means FP32: TF32 has the mantissa of FP16, which is a precision of its own.
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        frames = network.get_input(index)
        _, *rest = frames.shape
        profile.set_shape(frames.name, (1, *rest), (1, *rest), (max_batch, *rest))
    config.add_optimization_profile(profile)
    _use_timing_cache(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise tensorrt.failure("build an engine")
    measured = config.get_timing_cache()
    if measured is not None:
        write_atomically(timing_cache, bytes(measured.serialize()))
    return bytes(engine)


def _use_timing_cache(config: Any, path: Path) -> None:
    """Attach what earlier builds measured, or nothing where TensorRT does not take it."""
    for stored in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(stored)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return
        _logger.info("%s is of no use to this TensorRT; layers are measured again", path)


@functools.cache
def _load_once(trt: Any, library: Path) -> bool:
    """Load the plugin into the registry of the process, where builder, parser and runtime all look."""
    registry = trt.get_plugin_registry()
    return registry.load_library(str(library)) is not None and registry.get_creator(*_PLUGIN) is not None


@functools.cache
def _logger_class(trt: Any) -> type[Any]:
    class Logger(trt.ILogger):  # type: ignore[misc]  # its base is known only at run time
        """Passes messages on to the logger of this module."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            line = " ".join(message.split())
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(line[:300])
            _logger.debug("%s: %s", severity, line)

    return Logger
