"""A model of anomalib's as it was exported, run as anomalib's own inferencer runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

# OpenVINO by itself computes in BF16 on processors that have it, which is faster and may change what comes out.
EngineName = Literal["onnxruntime", "openvino", "openvino-f32"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

# A uint8 RGB frame [H, W, 3] in memory to its score and its map.
Runner = Callable[[NDArray[np.uint8]], tuple[float, NDArray[np.float32]]]

_OUTPUTS = ("pred_score", "anomaly_map")


@dataclass(frozen=True, slots=True)
class PeerGraph:
    """One exported model.

    Attributes:
        path: The ONNX file; its tensors lie beside it.
        weights: Which weights it has.
        is_fitted: Whether they are those of a fitted model, so that its scores mean something.
        memory_bank: Patches its memory holds; None for a method without one.
    """

    path: Path
    weights: str
    is_fitted: bool
    memory_bank: int | None = None

    def open(self, engine: EngineName, threads: int | None) -> Runner:
        """The graph on an engine; None leaves the threads to it."""
        if engine == "onnxruntime":
            return _open_onnxruntime(self.path, threads)
        return _open_openvino(self.path, threads, only_f32=engine == "openvino-f32")


def model_input(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float32 [1, 3, H, W] from 0 to 1, as ``OpenVINOInferencer.pre_process`` makes it; the graph normalises it."""
    image = frame.astype(np.float32)
    if image.max() > 1.0:
        image /= 255.0
    return image[np.newaxis].transpose(0, 3, 1, 2)


def _open_onnxruntime(path: Path, threads: int | None) -> Runner:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (image,) = (node.name for node in session.get_inputs())
    # All outputs, as the inferencer asks for them: its binary label and mask, too.
    names = [node.name for node in session.get_outputs()]
    score, evidence = (names.index(name) for name in _OUTPUTS)

    def run(frame: NDArray[np.uint8]) -> tuple[float, NDArray[np.float32]]:
        results = session.run(None, {image: model_input(frame)})
        return float(results[score].item()), results[evidence]

    return run


def _open_openvino(path: Path, threads: int | None, *, only_f32: bool) -> Runner:
    import openvino

    # The hint that AUTO, the inferencer's device, gives the processor.
    options: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY"}
    if only_f32:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(openvino.convert_model(path), "CPU", options)
    score, evidence = (compiled.output(name) for name in _OUTPUTS)

    def run(frame: NDArray[np.uint8]) -> tuple[float, NDArray[np.float32]]:
        results = compiled(model_input(frame))
        return float(results[score].item()), results[evidence]

    return run


def openvino_arithmetic() -> str:
    """What OpenVINO computes floating-point models in on this processor by default: ``f32`` or ``bf16``."""
    import openvino

    chosen = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    return str(chosen.get_type_name())
