"""An exported graph as TensorRT's parser takes it; needs onnx alone, because a device without torch builds engines."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from meliad_edge.errors import BundleError

# Those of scoring_function.py, which needs torch.
_SCORING = ("meliad", "PatchEntropyScore")


def to_tensorrt(model: bytes) -> bytes:
    """Rewrite a graph so that TensorRT parses it and its plugin takes the scoring node.

    The function body of the scoring node is removed, because the parser would inline it in spite of the plugin; other
    bodies take the place of their nodes. Frames are cast before they are transposed, because TensorRT does nothing with
    uint8 but cast it. Biases that INT8 graphs keep as int32 become the float32 they stand for, because TensorRT
    dequantises nothing wider than a byte. All of that leaves the values as they are. Bytes around a zero point, which
    TensorRT does not take, become signed bytes around 0 for the same range: tensors that are never negative lose one
    of their eight bits.

    Args:
        model: A serialised graph of ours, in any precision.

    Raises:
        BundleError: It is not an ONNX graph, or does with its frames what TensorRT cannot.
    """
    try:
        rewritten = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's errors differ between its versions
        msg = f"the graph is not an ONNX model ({type(error).__name__}); export the bundle again"
        raise BundleError(msg) from error
    bodies = [body for body in rewritten.functions if (body.domain, body.name) != _SCORING]
    del rewritten.functions[:]
    rewritten.functions.extend(bodies)
    rewritten = inline_local_functions(rewritten)
    for value in rewritten.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            _cast_first(rewritten.graph, value.name)
    _quantise_around_zero(rewritten.graph)
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


def _quantise_around_zero(graph: GraphProto) -> None:
    """Give every tensor that is quantised with a zero point signed bytes around 0 that cover the same range."""
    constants = {constant.name: constant for constant in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) > 2:
            scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:])
            lowest, highest = np.iinfo(zero_point.dtype).min, np.iinfo(zero_point.dtype).max
            if (zero_point == lowest).all():
                # Bytes that end at 0 took the place of an activation.
                source = f"{node.input[0]}_not_negative"
                nodes.append(helper.make_node("Relu", [node.input[0]], [source], name=f"{node.name}_not_negative"))
                node.input[0] = source
            if zero_point.dtype != np.int8 or zero_point.any():
                largest = np.maximum(zero_point.astype(np.int64) - lowest, highest - zero_point.astype(np.int64))
                _set(constants[node.input[1]], np.asarray(scale * largest / 127, np.float32))
                _set(constants[node.input[2]], np.zeros(zero_point.shape, np.int8))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _set(constant: TensorProto, value: NDArray[np.generic]) -> None:
    constant.CopyFrom(numpy_helper.from_array(value, constant.name))


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
