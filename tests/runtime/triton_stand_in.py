"""A server of the protocol of Triton that serves a model repository, and can be told to fail.

It reads ``config.pbtxt`` with Triton's own schema and executes ``model.onnx`` in ONNX Runtime as Triton's backend does:
with the libraries that ``model_operations`` names, one version by the version policy, frames of noise to warm up, no
batch above the largest, and outputs reshaped. It has none of Triton's scheduling.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

Change = Callable[[Any], None]


class ServedModel:
    """One model of a repository, loaded as its configuration says."""

    def __init__(self, folder: Path) -> None:
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        self.config: Any = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert self.config.name == folder.name
        assert self.config.platform == "onnxruntime_onnx"
        (self.version,) = self.config.version_policy.specific.versions
        options = ort.SessionOptions()
        options.log_severity_level = 3
        for library in self.config.model_operations.op_library_filename:
            options.register_custom_ops_library(library)
        graph = folder / str(self.version) / "model.onnx"
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.batches: list[int] = []
        for warm_up in self.config.model_warmup:
            self.run(self._noise(warm_up))
        self.batches.clear()

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs as Triton sends them."""
        self.batches += [len(array) for array in inputs.values()]
        names = [output.name for output in self.config.output]
        arrays = dict(zip(names, self.session.run(names, inputs), strict=True))
        for output in self.config.output:
            inside = list(output.reshape.shape) if output.HasField("reshape") else list(output.dims)
            array = arrays[output.name]
            assert list(array.shape[1:]) == inside
            arrays[output.name] = array.reshape(len(array), *output.dims)
        return arrays

    def _noise(self, warm_up: Any) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        return {
            name: random.integers(0, 256, (warm_up.batch_size, *value.dims)).astype(
                triton_to_np_dtype(model_config_pb2.DataType.Name(value.data_type).removeprefix("TYPE_"))
            )
            for name, value in warm_up.inputs.items()
            if value.random_data
        }


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The server, listening on a free port of this machine.

    Attributes:
        change_config: Applied to the configuration that a client is told.
        change_answer: Applied to every answer.
        is_ready: What clients are told of every model.
        delay_s: Waited before each answer.
    """

    def __init__(self, repository: Path, credentials: grpc.ServerCredentials | None = None) -> None:
        self.models = {folder.name: ServedModel(folder) for folder in repository.iterdir() if folder.is_dir()}
        self.change_config: Change = lambda config: None
        self.change_answer: Change = lambda answer: None
        self.is_ready = True
        self.delay_s = 0.0
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port("localhost:0")
        else:
            self.port = self._server.add_secure_port("localhost:0", credentials)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        known = request.name in self.models
        return service_pb2.ModelReadyResponse(ready=known and self.is_ready)

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        answer = service_pb2.ModelConfigResponse(config=self._model(request.name, request.version, context).config)
        self.change_config(answer.config)
        return answer

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        model = self._model(request.model_name, request.model_version, context)
        inputs = {
            tensor.name: np.frombuffer(content, triton_to_np_dtype(tensor.datatype)).reshape(tuple(tensor.shape))
            for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        for name, array in inputs.items():
            (described,) = (tensor for tensor in model.config.input if tensor.name == name)
            assert list(array.shape[1:]) == list(described.dims)
            if len(array) > model.config.max_batch_size:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"batch-size must be <= {model.config.max_batch_size}")
        time.sleep(self.delay_s)
        outputs = model.run(inputs)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=str(model.version))
        for asked in request.outputs:
            array = outputs[asked.name]
            answer.outputs.add(name=asked.name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            answer.raw_output_contents.append(array.tobytes())
        self.change_answer(answer)
        return answer

    def _model(self, name: str, version: str, context: grpc.ServicerContext) -> ServedModel:
        model = self.models.get(name)
        if model is None or version not in ("", str(model.version)):
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found"
            )
        assert model is not None
        return model
