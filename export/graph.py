"""A trained network as one ONNX graph: uint8 NHWC frames in, raw scores, maps and nearest prototypes out."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from meliad_edge.export.even_light_function import even_light_function, even_light_node
from meliad_edge.export.scoring_function import scoring_function, scoring_node, scoring_opset
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.network import DetectorNetwork, PrototypeNetwork
from meliad_edge.runtime.onnxruntime_engine import OUTPUT_NAMES

OPSET = 18
# The oldest ONNX Runtime that has wheels for JetPack 6 reads files up to this version.
IR_VERSION = 10


class _Embedding(nn.Module):
    """The part of a network in front of the scoring node, and behind the node of even light where it has one."""

    def __init__(self, network: PrototypeNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        backbone = self.network.backbone
        return self.network.embed(backbone.levels_of_images(inputs) if backbone.even_light else backbone(inputs))


def export_graph(network: DetectorNetwork) -> onnx.ModelProto:
    """Convert a network.

    A prototype network is traced from the images to the embeddings. The scoring node is appended, the node of even
    light put in front where the network has it, each with its function body, so that no exporter can take them apart.
    Any other network is traced whole.

    Returns:
        A checked model of opset 18, for a prototype network plus the ``meliad`` domain. Input ``frames`` uint8
        [batch, H, W, 3]; outputs ``score_raw`` [batch], ``map_raw`` [batch, h, w], ``nearest`` int64 [batch, 2, h, w].
    """
    height, width = network.input_hw
    frames = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    if not isinstance(network, PrototypeNetwork):
        model = _export_module(network, "frames", frames, list(OUTPUT_NAMES))
    elif network.backbone.even_light:
        model = _export_module(_Embedding(network), "images", torch.zeros((2, 3, height, width)), ["embeddings"])
        _prepend_even_light(model, network)
        _append_scoring(model, network)
    else:
        model = _export_module(_Embedding(network), "frames", frames, ["embeddings"])
        _append_scoring(model, network)
    onnx.checker.check_model(model, full_check=True)
    return model


def _prepend_even_light(model: onnx.ModelProto, network: PrototypeNetwork) -> None:
    (images,) = model.graph.input
    node = even_light_node("frames", images.name, network.backbone)
    frames = helper.make_tensor_value_info("frames", TensorProto.UINT8, ["batch", *network.input_hw, 3])
    nodes = [node, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.value_info.append(images)
    del model.graph.input[:]
    model.graph.input.append(frames)
    model.functions.append(even_light_function())


def _append_scoring(model: onnx.ModelProto, network: PrototypeNetwork) -> None:
    graph = model.graph
    height, width = network.grid_hw
    graph.initializer.extend(
        [
            numpy_helper.from_array(network.prototypes.detach().numpy(), "prototypes"),
            numpy_helper.from_array(network.direction.detach().numpy(), "direction"),
        ]
    )
    graph.node.append(scoring_node(("embeddings", "prototypes", "direction"), OUTPUT_NAMES, network.scoring))
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info("score_raw", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("map_raw", TensorProto.FLOAT, ["batch", height, width]),
            helper.make_tensor_value_info("nearest", TensorProto.INT64, ["batch", 2, height, width]),
        ]
    )
    model.functions.append(scoring_function())
    model.opset_import.append(scoring_opset())


def export_bare_backbone(backbone: Backbone, input_hw: tuple[int, int]) -> onnx.ModelProto:
    """The backbone alone, with the same input: the yardstick of every latency ratio."""
    frames = torch.zeros((2, *input_hw, 3), dtype=torch.uint8)
    return _export_module(backbone, "frames", frames, [f"stride{stride}" for stride in backbone.strides])


def _export_module(module: nn.Module, input_name: str, example: Tensor, output_names: list[str]) -> onnx.ModelProto:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=output_names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    model.producer_name = "meliad-edge"
    # Notes of the tracer (source lines, paths) would make the file depend on where it was made.
    del model.metadata_props[:]
    for value in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress lines and deprecation notes of its dependencies off the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
