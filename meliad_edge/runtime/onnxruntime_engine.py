"""The default engine: ONNX Runtime on the CPU, with our scoring kernel when it was built, without torch."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from meliad_edge.errors import BundleError
from meliad_edge.runtime.engine import RawScores
from meliad_edge.runtime.kernel_library import find_kernel_library

_logger = logging.getLogger(__name__)

OUTPUT_NAMES = ("score_raw", "map_raw", "nearest")


class OnnxRuntimeEngine:
    """Scores frames with an exported graph.

    Args:
        model: The serialised ONNX graph.
        threads: Threads of the session; None lets ONNX Runtime use every core.
        use_kernel: Register our kernel library if there is one; without it the function body that travels
            with the model is executed, with the same results.
        profile_prefix: Write ONNX Runtime's profile to files of that prefix.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
    """

    def __init__(
        self,
        model: bytes,
        *,
        threads: int | None = None,
        use_kernel: bool = True,
        profile_prefix: Path | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Never its own format, whatever the bytes look like: only ONNX is checked when a bundle is opened.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_prefix)
        self.has_kernel = use_kernel and _register_kernel(options)
        try:
            self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common base class for its load errors
            first_line = str(error).splitlines()[0]
            msg = f"ONNX Runtime {ort.__version__} refuses the graph ({first_line}); export the bundle again"
            raise BundleError(msg) from error
        frames = self.session.get_inputs()[0]
        outputs = [output.name for output in self.session.get_outputs()]
        is_ours = frames.type == "tensor(uint8)" and [type(side) for side in frames.shape[1:]] == [int, int, int]
        if not is_ours or outputs != list(OUTPUT_NAMES):
            msg = f"the graph takes {frames.type} {frames.shape} and gives {outputs}; it is not a model of ours"
            raise BundleError(msg)
        self._input_name: str = frames.name
        self._input_size_hw: tuple[int, int] = (frames.shape[1], frames.shape[2])

    @property
    def name(self) -> str:
        """What executes the model."""
        return f"onnxruntime-cpu{'+kernel' if self.has_kernel else ''}"

    @property
    def input_size_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that :meth:`infer` takes."""
        return self._input_size_hw

    def infer(self, frames: NDArray[np.uint8]) -> RawScores:
        """Score a batch of RGB frames, uint8 [N, H, W, 3]."""
        score, evidence, nearest = self.session.run(OUTPUT_NAMES, {self._input_name: frames})
        return RawScores(score, evidence, nearest)


def _register_kernel(options: ort.SessionOptions) -> bool:
    library = find_kernel_library()
    if library is None:
        return False
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # raised as a bare Exception of the extension module
        _logger.warning("%s cannot be used (%s); scoring runs on the model's function body", library.name, error)
        return False
    return True
