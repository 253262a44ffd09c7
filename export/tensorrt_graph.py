"""An exported graph as TensorRT's parser takes it; needs onnx alone, because a device without torch builds engines."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from meliad_edge.errors import BundleError

# Those of scoring_function.py, which needs torch.
_SCORING = ("meliad", "PatchEntropyScore")


def to_tensorrt(model: bytes) -> bytes:
    """Rewrite a graph so that TensorRT parses it and its plugin takes the scoring node; the values stay the same.

    The function body of the scoring node is removed, because the parser would inline it in spite of the plugin. Frames
    are cast before they are transposed, because TensorRT does nothing with uint8 but cast it. Biases that INT8 graphs
    keep as int32 become the float32 they stand for, because TensorRT dequantises nothing wider than a byte.

    Args:
        model: A serialised graph of ours, in any precision.

    Raises:
        BundleError: It is not an ONNX graph, does with its frames what TensorRT cannot, or quantises with a zero point.
    """
    try:
        rewritten = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's errors differ between its versions
        msg = f"the graph is not an ONNX model ({type(error).__name__}); export the bundle again"
        raise BundleError(msg) from error
    bodies = [body for body in rewritten.functions if (body.domain, body.name) != _SCORING]
    del rewritten.functions[:]
    rewritten.functions.extend(bodies)
    for value in rewritten.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            _cast_first(rewritten.graph, value.name)
    _require_symmetric(rewritten.graph)
    _fold_biases(rewritten.graph)
    return bytes(rewritten.SerializeToString(deterministic=True))


def _cast_first(graph: GraphProto, frames: str) -> None:
    """Swap every transposition of the frames with the casts that follow it."""
    transposes: dict[str, NodeProto] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        before = [transposes[name] for name in node.input if name in transposes]
        if frames in node.input and node.op_type == "Transpose":
            transposes[node.output[0]] = node
        elif node.op_type == "Cast" and before:
            nodes += _swapped(before[0], node)
        elif before or (frames in node.input and node.op_type != "Cast"):
            msg = f"{node.op_type} takes frames as uint8, which TensorRT only casts; export the bundle again"
            raise BundleError(msg)
        else:
            nodes.append(node)
    # What lay between was uint8, and no tensor has that name any more.
    values = [value for value in graph.value_info if value.name not in transposes]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    graph.value_info.extend(values)


def _swapped(transpose: NodeProto, cast: NodeProto) -> tuple[NodeProto, NodeProto]:
    """The cast, then the transposition, between the same tensors."""
    first, second = NodeProto(), NodeProto()
    first.CopyFrom(cast)
    second.CopyFrom(transpose)
    pixels = f"{cast.output[0]}_untransposed"
    first.input[:], first.output[:] = transpose.input, [pixels]
    second.input[:], second.output[:] = [pixels], cast.output
    second.name = f"{transpose.name}_of_{pixels}"  # one transposition may be followed by several casts
    return first, second


def _require_symmetric(graph: GraphProto) -> None:
    constants = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3:
            continue
        zero_point = numpy_helper.to_array(constants[node.input[2]])
        if zero_point.dtype != np.int8 or zero_point.any():
            msg = (
                f"{node.input[0]} is quantised as {zero_point.dtype} around {zero_point.flat[0]}, TensorRT takes int8 "
                "around 0 alone; build the engine with --precision fp16"
            )
            raise BundleError(msg)


def _fold_biases(graph: GraphProto) -> None:
    """Replace each dequantisation of an int32 constant by what it gives."""
    constants = {constant.name: constant for constant in graph.initializer}
    folded = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in constants
        and constants[node.input[0]].data_type == TensorProto.INT32
    ]
    for node in folded:
        value, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
        # One scale per element, or one for all; the zero point of an int32 is always 0.
        bias = value.astype(np.float32) * scale
        graph.initializer.append(numpy_helper.from_array(bias, node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    kept = [constant for constant in graph.initializer if constant.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
