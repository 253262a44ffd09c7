"""An exported graph as TensorRT's parser takes it; needs onnx alone, because a device without torch builds engines."""

from __future__ import annotations

import onnx
from onnx import GraphProto, NodeProto, TensorProto

from meliad_edge.errors import BundleError

# Those of scoring_function.py, which needs torch.
_SCORING = ("meliad", "PatchEntropyScore")


def to_tensorrt(model: bytes) -> bytes:
    """Rewrite a graph so that TensorRT parses it and its plugin takes the scoring node; the values stay the same.

    The function body of the scoring node is removed, because the parser would inline it in spite of the plugin. Frames
    are cast before they are transposed, because TensorRT does nothing with uint8 but cast it.

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
    for value in rewritten.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            _cast_first(rewritten.graph, value.name)
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
