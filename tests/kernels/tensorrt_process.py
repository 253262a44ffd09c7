"""Loads the plugin into a real TensorRT and says what happened, as JSON: run on its own, because a mistake crashes it.

tensorrt_process.py registry LIBRARY            fields of the creator, and whether a plugin can be created
tensorrt_process.py engine LIBRARY MODEL.onnx   layers of the parsed network, and the size of the engine
tensorrt_process.py build LIBRARY MODEL.onnx TIMING    an engine as `meliad-edge build` builds it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

PARAMETERS = {
    "n_normal": 29,
    "top_cells": 4,
    "softness": 1.5,
    "normal_scale": 1.125,
    "anomaly_scale": 0.625,
    "bias": -0.375,
    "kappa": 0.4375,
    "offset": 0.25,
}


def registry(library: str) -> dict[str, Any]:
    """With the lean runtime: it has the plugin registry of TensorRT, and needs no GPU as long as nothing is run."""
    import tensorrt_lean as trt

    plugins = trt.get_plugin_registry()
    assert plugins.load_library(library) is not None
    creator = plugins.get_creator("PatchEntropyScore", "1", "")

    def can_create(**parameters: float) -> bool:
        values = {  # kept here: a field only points to its value
            name: np.array([value], np.int32 if isinstance(value, int) else np.float32)
            for name, value in parameters.items()
        }
        fields = [
            trt.PluginField(
                name,
                value,
                trt.PluginFieldType.INT32 if value.dtype == np.int32 else trt.PluginFieldType.FLOAT32,
            )
            for name, value in values.items()
        ]
        collection = trt.PluginFieldCollection(fields)
        return creator.create_plugin("scoring", collection, trt.TensorRTPhase.RUNTIME) is not None

    return {
        "version": trt.__version__,
        "fields": [field.name for field in creator.field_names],
        "created": can_create(**PARAMETERS),
        "created_with_kappa_2": can_create(**PARAMETERS | {"kappa": 2.0}),
    }


def engine(library: str, model: str) -> dict[str, Any]:
    """With TensorRT for RTX: it parses and builds without a GPU, for GPUs of its own, and cannot run the result."""
    import tensorrt_rtx as trt

    messages: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    assert builder.get_plugin_registry().load_library(library) is not None
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(model).read_bytes()):
        return {"parsed": False, "errors": messages}
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        shape = tuple(network.get_input(i).shape)
        smallest, usual, largest = ([size if size >= 0 else free for size in shape] for free in (2, 4, 8))
        profile.set_shape(network.get_input(i).name, smallest, usual, largest)
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    return {
        "parsed": True,
        "plugins": [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3],
        "layers": len(layers),
        "outputs": {output.name: [output.dtype.name, list(output.shape)] for output in outputs},
        "engine_bytes": 0 if serialized is None else serialized.nbytes,
        "plugin_is_in_engine": serialized is not None and b"PatchEntropyScore" in bytes(serialized),
        "errors": messages,
    }


def build(library: str, model: str, timing_cache: str) -> dict[str, Any]:
    """Our own build, with TensorRT for RTX in the place of TensorRT."""
    import tensorrt_rtx as trt

    from meliad_edge.errors import EngineError
    from meliad_edge.runtime.tensorrt_build import build_engine, with_plugin

    try:
        built = build_engine(
            with_plugin(trt, Path(library)),
            Path(model).read_bytes(),
            max_batch=4,
            workspace_mb=256,
            timing_cache=Path(timing_cache),
        )
    except EngineError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"engine_bytes": len(built), "plugin_is_in_engine": b"PatchEntropyScore" in built}


if __name__ == "__main__":
    print(json.dumps({"registry": registry, "engine": engine, "build": build}[sys.argv[1]](*sys.argv[2:])))
