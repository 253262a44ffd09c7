"""What this machine can execute an exported graph with."""

from __future__ import annotations

from importlib.util import find_spec

from meliad_edge.export.portable import to_portable
from meliad_edge.runtime.engine import Engine
from meliad_edge.runtime.kernel_library import find_kernel_library
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine


def processor_engines(model: bytes) -> list[Engine]:
    """Every engine of this machine that executes a graph on its processor."""
    engines: list[Engine] = [OnnxRuntimeEngine(model, use_kernel=False)]
    if find_kernel_library() is not None:
        engines.append(OnnxRuntimeEngine(model))
    if find_spec("openvino") is not None:
        from meliad_edge.runtime.openvino_engine import OpenVinoEngine

        engines.append(OpenVinoEngine(to_portable(model)))
    return engines
