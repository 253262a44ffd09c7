"""FP16: the convolutions of a graph in half precision, everything else, the entropy part above all, in FP32."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from meliad_edge.export.region import low_precision_region

_SUFFIX = "_fp16"
ROUNDED = "_rounded"


def to_fp16(model: ModelProto, keep_fp32: Collection[str] = ()) -> ModelProto:
    """Convert the low-precision region of a graph; inputs and outputs stay as they are.

    Weights are rounded, tensors that enter or leave the region are cast. Nothing else changes.

    Args:
        model: FP32 graph; not changed.
        keep_fp32: Names of nodes that stay in FP32.
    """
    result, converted, constants, made_inside = _copy_of(model, keep_fp32)
    graph = result.graph
    read_outside = {name for node in graph.node if node.name not in converted for name in node.input}
    read_outside.update(output.name for output in graph.output)
    nodes = []
    halved: set[str] = set()
    for node in graph.node:
        if node.name not in converted:
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if not name:
                continue
            node.input[index] = name + _SUFFIX
            if name in halved or name in made_inside:
                continue
            halved.add(name)
            if name in constants:
                rounded = numpy_helper.to_array(constants[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(rounded, name + _SUFFIX))
            else:
                nodes.append(_cast(name, name + _SUFFIX, TensorProto.FLOAT16))
        outputs = list(node.output)
        node.output[:] = [name + _SUFFIX for name in outputs]
        nodes.append(node)
        nodes += [_cast(name + _SUFFIX, name, TensorProto.FLOAT) for name in outputs if name in read_outside]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [initializer for initializer in graph.initializer if initializer.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    return result


def emulate_fp16(model: ModelProto, keep_fp32: Collection[str] = ()) -> ModelProto:
    """The graph of :func:`to_fp16` with each result rounded to half precision, for engines that compute in FP32.

    ONNX Runtime and OpenVINO keep the results of half-precision convolutions in FP32 on a processor without half
    arithmetic, and so say nothing of what a GPU would give. Sums within one convolution stay in FP32 here.

    Args:
        model: FP32 graph; not changed.
        keep_fp32: Names of nodes that stay in FP32.
    """
    result, lowered, constants, made_inside = _copy_of(model, keep_fp32)
    graph = result.graph
    entered: set[str] = set()
    nodes = []
    for node in graph.node:
        inside = node.name in lowered
        for index, name in enumerate(node.input):
            if name in made_inside:
                node.input[index] = name + ROUNDED
            elif inside and name in constants:
                values = numpy_helper.to_array(constants[name]).astype(np.float16).astype(np.float32)
                constants[name].CopyFrom(numpy_helper.from_array(values, name))
            elif inside and name:
                node.input[index] = name + ROUNDED
                nodes += [] if name in entered else _round_trip(name)
                entered.add(name)
        nodes.append(node)
        if inside:
            nodes += [cast for name in node.output for cast in _round_trip(name)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return result


def _copy_of(
    model: ModelProto, keep_fp32: Collection[str]
) -> tuple[ModelProto, set[str], dict[str, TensorProto], set[str]]:
    """A graph to change, names of the nodes to lower in it, its constants by name, and the tensors those nodes make."""
    result = ModelProto()
    result.CopyFrom(model)
    lowered = {node.name for node in low_precision_region(result)} - set(keep_fp32)
    constants = {initializer.name: initializer for initializer in result.graph.initializer}
    made_inside = {name for node in result.graph.node if node.name in lowered for name in node.output}
    return result, lowered, constants, made_inside


def _round_trip(name: str) -> list[NodeProto]:
    half = name + _SUFFIX
    return [_cast(name, half, TensorProto.FLOAT16), _cast(half, name + ROUNDED, TensorProto.FLOAT)]


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)
