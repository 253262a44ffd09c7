"""What the tests of graphs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

RunGraph = Callable[[ModelProto, NDArray[Any]], NDArray[Any]]


@pytest.fixture(scope="session")
def run_graph() -> RunGraph:
    """First output of a checked graph in ONNX Runtime, given its input ``frames``."""

    def run(model: ModelProto, frames: NDArray[Any]) -> NDArray[Any]:
        onnx.checker.check_model(model, full_check=True)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"frames": frames})[0])

    return run
