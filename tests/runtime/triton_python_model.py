"""What Triton's Python backend executes in place of the ONNX Runtime backend: the same graph, in ONNX Runtime.

The backend's process knows nothing of this environment, so the test hands its paths over. It was compiled for NumPy 1,
and takes the arrays of NumPy 2 for empty; through DLPack they pass.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = os.environ["PATHS_OF_THE_TEST"].split(os.pathsep)


class TritonPythonModel:
    """The interface that the backend looks for."""

    def initialize(self, arguments: dict[str, str]) -> None:
        import onnxruntime

        folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        import numpy as np
        import triton_python_backend_utils as backend

        responses = []
        for request in requests:
            frames = np.from_dlpack(backend.get_input_tensor_by_name(request, "frames"))
            arrays = self._session.run(self._names, {"frames": frames})
            outputs = [backend.Tensor.from_dlpack(*pair) for pair in zip(self._names, arrays, strict=True)]
            responses.append(backend.InferenceResponse(outputs))
        return responses
