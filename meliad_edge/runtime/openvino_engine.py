"""OpenVINO on the processor: a second reader of the portable graph, which ``check`` holds against the first."""

from __future__ import annotations

import numpy as np
import openvino
from numpy.typing import NDArray

from meliad_edge.errors import BundleError
from meliad_edge.runtime.engine import RawScores
from meliad_edge.runtime.onnxruntime_engine import OUTPUT_NAMES


class OpenVinoEngine:
    """Scores frames with a portable graph.

    Args:
        model: The serialised graph in standard ONNX operators.
        threads: None lets OpenVINO use every core.

    Raises:
        BundleError: OpenVINO refuses the graph.
    """

    name = "openvino-cpu"

    def __init__(self, model: bytes, *, threads: int | None = None) -> None:
        core = openvino.Core()
        # OpenVINO would choose BF16 by itself on processors that have it; the graph says what runs in what.
        options: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._compiled = core.compile_model(core.read_model(model), "CPU", options)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            msg = f"OpenVINO {openvino.__version__} refuses the graph ({reason}); export it again"
            raise BundleError(msg) from error
        self._outputs = [self._compiled.output(name) for name in OUTPUT_NAMES]
        _, height, width, _ = self._compiled.input(0).partial_shape
        self._input_size_hw = (height.get_length(), width.get_length())

    @property
    def input_size_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that :meth:`infer` takes."""
        return self._input_size_hw

    def infer(self, frames: NDArray[np.uint8]) -> RawScores:
        """Score a batch of RGB frames, uint8 [N, H, W, 3]."""
        results = self._compiled(frames)
        score, evidence, nearest = (results[output] for output in self._outputs)
        return RawScores(score, evidence, nearest)
