"""The same graph in standard ONNX operators alone, for OpenVINO and every other reader of ONNX."""

from __future__ import annotations

import onnx
from onnx.inliner import inline_local_functions

from meliad_edge.export.scoring_function import DOMAIN


def to_portable(model: bytes) -> bytes:
    """Put the body of the scoring function in place of its node; inputs, outputs and values stay the same.

    Args:
        model: A graph of :func:`~meliad_edge.export.graph.export_graph`, in any precision.
    """
    inlined = inline_local_functions(onnx.load_model_from_string(model))
    standard = [opset for opset in inlined.opset_import if opset.domain != DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(standard)
    onnx.checker.check_model(inlined, full_check=True)
    return bytes(inlined.SerializeToString(deterministic=True))
