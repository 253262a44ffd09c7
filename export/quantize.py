"""INT8: the convolutions of a graph on 8-bit integers, calibrated on real frames, written as Q/DQ pairs."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from meliad_edge.export.region import ACTIVATIONS, low_precision_region
from meliad_edge.export.weight_rounding import round_weights
from meliad_edge.progress import track

_OPERATORS = sorted({"Conv", "Add"} | ACTIVATIONS)
# Frames, of those given, that the weights are rounded on.
_ROUNDING_FRAMES = 36


class _FrameReader(CalibrationDataReader):  # type: ignore[misc]
    """Hands frames to the calibrator one by one."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        self._frames = track(list(frames), "calibrating int8")

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        frame = next(self._frames, None)
        return None if frame is None else {"frames": frame[np.newaxis]}


class Quantizer:
    """Quantises one graph any number of times, with other layers left out.

    Weights are symmetric signed bytes with a scale per output channel, rounded so that results change least;
    activations are unsigned bytes whose range is the smallest and the largest value seen, so that an activation's
    clipping costs nothing.

    Args:
        model: FP32 graph; not changed.
        frames: What ranges and weights are fitted on, uint8 RGB [n, H, W, 3].
    """

    def __init__(self, model: ModelProto, frames: NDArray[np.uint8]) -> None:
        self._model = onnx.shape_inference.infer_shapes(model)
        self._nodes = [node for node in low_precision_region(self._model) if node.op_type in _OPERATORS]
        self._ranges = self._measure_ranges(frames)
        self._weights = round_weights(self._model, frames[:: max(1, len(frames) // _ROUNDING_FRAMES)])

    def quantize(self, keep_fp32: Collection[str] = ()) -> ModelProto:
        """The graph with Q/DQ pairs around every convolution.

        Args:
            keep_fp32: Names of nodes that stay in FP32.
        """
        copy = ModelProto()
        copy.CopyFrom(self._model)
        nodes = self._quantized_nodes(keep_fp32)
        if not nodes:
            return copy
        weights = {node.input[1] for node in copy.graph.node if node.name in nodes and node.op_type == "Conv"}
        for constant in copy.graph.initializer:
            if constant.name in weights and constant.name in self._weights:
                constant.CopyFrom(numpy_helper.from_array(self._weights[constant.name], constant.name))
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=nodes,
            nodes_to_exclude=[],
            op_types_to_quantize=_OPERATORS,
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        result: ModelProto = quantizer.model.model
        del result.graph.value_info[:]
        return result

    def _quantized_nodes(self, keep_fp32: Collection[str]) -> list[str]:
        """All but those that are kept, activations and sums where all they read is quantised, and one exception.

        ONNX Runtime takes a convolution in FP32 between two quantised tensors for a forgotten one, and rounds its
        weights with one scale for all channels. So what reads the result of such a convolution stays in FP32, too.
        """
        chosen: list[str] = []
        quantized: set[str] = set()
        exposed: set[str] = set()
        for node in self._nodes:
            data = node.input if node.op_type == "Add" else node.input[:1]
            if node.op_type == "Conv":
                fits, exposes = exposed.isdisjoint(data), quantized.issuperset(data)
            else:
                fits, exposes = quantized.issuperset(data), node.op_type != "Add" and exposed.issuperset(data)
            if fits and node.name not in keep_fp32:
                chosen.append(node.name)
                quantized.update(node.output)
            elif exposes:
                exposed.update(node.output)
        return chosen

    def _measure_ranges(self, frames: NDArray[np.uint8]) -> TensorsData:
        with tempfile.TemporaryDirectory(prefix="meliad-int8-") as name:
            folder = Path(name)
            onnx.save(self._model, folder / "model.onnx")
            calibrator = create_calibrator(
                folder / "model.onnx",
                _OPERATORS,
                augmented_model_path=str(folder / "augmented.onnx"),
                calibrate_method=CalibrationMethod.MinMax,
                providers=["CPUExecutionProvider"],
            )
            calibrator.collect_data(_FrameReader(frames))
            return calibrator.compute_data()
