"""The part of a graph that may run in lower precision: its convolutions and what merely passes their results on."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, NodeProto

ACTIVATIONS = frozenset({"Clip", "Relu"})
_FOLLOWS = ACTIVATIONS | {"Add", "AveragePool", "MaxPool"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution with the activation behind it.

    Attributes:
        name: Of its weight, without the prefix all layers of a network share.
        weight: The constant.
        output: Tensor that holds its result.
        nodes: Names of its nodes.
    """

    name: str
    weight: str
    output: str
    nodes: tuple[str, ...]


def low_precision_region(model: ModelProto) -> list[NodeProto]:
    """Nodes that may run in lower precision, in their order.

    Convolutions, and activations, sums and poolings of nothing but their results. What comes before the first
    convolution handles pixel values up to 255 squared, what comes after the last one measures distances: both keep
    FP32.
    """
    constants = {initializer.name for initializer in model.graph.initializer}
    inside: set[str] = set()
    region = []
    for node in model.graph.node:
        data = [name for name in node.input if name and name not in constants]
        if node.op_type == "Conv" or (node.op_type in _FOLLOWS and data and inside.issuperset(data)):
            region.append(node)
            inside.update(node.output)
    return region


def layers(model: ModelProto) -> list[Layer]:
    """The convolutions of a graph, in their order."""
    region = low_precision_region(model)
    readers: dict[str, list[NodeProto]] = {}
    for node in region:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in region:
        if node.op_type != "Conv":
            continue
        following = readers.get(node.output[0], [])
        activation = following[0] if len(following) == 1 and following[0].op_type in ACTIVATIONS else None
        nodes = (node.name,) if activation is None else (node.name, activation.name)
        found.append(Layer(_short_name(node.input[1]), node.input[1], (activation or node).output[0], nodes))
    return found


def _short_name(weight: str) -> str:
    return weight.removeprefix("network.").removeprefix("backbone.").removeprefix("features.").removesuffix(".weight")
