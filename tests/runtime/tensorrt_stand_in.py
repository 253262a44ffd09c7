"""The module ``tensorrt`` for tests: the calls that our build and our engine make, on the CUDA driver's stand-in.

An engine is the ONNX graph it was built from. Executing one enqueues a host function on the stream, which computes with
ONNX Runtime from what then lies in the memory of the device, and writes its results there.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from enum import IntEnum
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from meliad_edge.runtime.kernel_library import find_kernel_library

__version__ = "10.3.0"

# Makes a TensorRT that computes other scores.
_SCALE = float(os.environ.get("TENSORRT_STAND_IN_SCALE", "1"))

MARK = b"stand-in engine\n"
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


# What tests look at and change.
built: list[dict[str, Any]] = []
executions: list[int] = []
refuse_to_execute_in_capture = False


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    TF32 = 6


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def log(self, severity: ILogger.Severity, message: str) -> None:
        raise NotImplementedError


class _Registry:
    def __init__(self) -> None:
        self.libraries: list[str] = []

    def load_library(self, path: str) -> object:
        self.libraries.append(path)
        return object()

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        return object() if self.libraries and (name, version, namespace) == ("PatchEntropyScore", "1", "") else None


_registry = _Registry()


def get_plugin_registry() -> _Registry:
    return _registry


def nptype(kind: type[Any]) -> type[Any]:
    return kind


class _Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        kind = value.type.tensor_type
        self.shape = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
        self.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)


class _Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.model = onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self.model.graph.input[index])


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self.network, self.logger = network, logger

    def parse(self, model: bytes) -> bool:
        self.network.model = onnx.load_model_from_string(model)
        if self.network.model.functions:
            self.logger.log(ILogger.Severity.ERROR, "the function takes\nthe node from the plugin")
            return False
        return True


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"measured "


class _Config:
    def __init__(self) -> None:
        self.record: dict[str, Any] = {"tf32": True}
        self.cache: _TimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.record["workspace"] = size

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.record["tf32"] = False

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.record["profile"] = profile.shapes

    def create_timing_cache(self, content: bytes) -> _TimingCache | None:
        return None if content.startswith(b"foreign") else _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self.cache


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = [list(shape) for shape in shapes]


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> _Network:
        return _Network(flags)

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        config.record["strongly_typed"] = bool(network.flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        built.append(config.record)
        profile = json.dumps(config.record["profile"]).encode()
        return MARK + profile + b"\n" + network.model.SerializeToString()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, engine: bytes) -> _Engine | None:
        if not engine.startswith(MARK):
            self.logger.log(ILogger.Severity.ERROR, "magic tag does not match")
            return None
        _, profile, model = engine.split(b"\n", 2)
        return _Engine(json.loads(profile), model)


class _Engine:
    def __init__(self, profile: dict[str, Any], model: bytes) -> None:
        graph = onnx.load_model_from_string(model).graph
        self.profile = profile
        self.inputs = {value.name: _Tensor(value) for value in graph.input}
        self.outputs = {value.name: _Tensor(value) for value in graph.output}
        self.tensors = self.inputs | self.outputs
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.register_custom_ops_library(str(find_kernel_library()))
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return list(self.profile[name])

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.batch = 0
        self.addresses: dict[str, int] = {}
        self.callbacks: list[Any] = []  # alive as long as a graph may call them

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.profile[name]
        if not smallest[0] <= shape[0] <= largest[0] or list(shape[1:]) != smallest[1:]:
            return False
        self.batch = shape[0]
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, *self.engine.tensors[name].shape[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        in_capture = _cuda().cuda_stand_in_calls(b"cuStreamBeginCapture") > _cuda().cuda_stand_in_calls(
            b"cuStreamEndCapture"
        )
        if refuse_to_execute_in_capture and in_capture:
            return False
        batch, addresses = self.batch, dict(self.addresses)
        callback = _CALLBACK(lambda _: self._compute(batch, addresses))
        self.callbacks.append(callback)
        code = _cuda().cuLaunchHostFunc(ctypes.c_void_p(stream), callback, None)
        return bool(code == 0)

    def _compute(self, batch: int, addresses: dict[str, int]) -> None:
        executions.append(batch)
        memory = {name: self._view(name, batch, address) for name, address in addresses.items()}
        inputs = {name: memory[name].copy() for name in self.engine.inputs}
        names = list(self.engine.outputs)
        for name, value in zip(names, self.engine.session.run(names, inputs), strict=True):
            memory[name][...] = value * _SCALE if name == "score_raw" else value

    def _view(self, name: str, batch: int, address: int) -> np.ndarray[Any, Any]:
        tensor = self.engine.tensors[name]
        shape = (batch, *tensor.shape[1:])
        size = int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize
        raw = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(raw, tensor.dtype).reshape(shape)
