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

from meliad_edge.export.scoring_function import scoring_function, scoring_node, scoring_opset
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.network import DetectorNetwork, PrototypeNetwork
from meliad_edge.runtime.onnxruntime_engine import OUTPUT_NAMES

OPSET = 18
# The oldest ONNX Runtime that has wheels for JetPack 6 reads files up to this version.
IR_VERSION = 10


class _Embedding(nn.Module):
    """The part of a network in front of the scoring node."""

    def __init__(self, network: PrototypeNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        return self.network.embed(self.network.backbone(frames))


def export_graph(network: DetectorNetwork) -> onnx.ModelProto:
    """Convert a network.

    The scoring node of a prototype network and its function body are appended to the traced embedding, so that no
    exporter can take them apart; any other network is traced whole.

    Returns:
        A checked model of opset 18, for a prototype network plus the ``meliad`` domain. Input ``frames`` uint8
        [batch, H, W, 3]; outputs ``score_raw`` [batch], ``map_raw`` [batch, h, w], ``nearest`` int64 [batch, 2, h, w].
    """
    if isinstance(network, PrototypeNetwork):
        model = _export_module(_Embedding(network), network.input_hw, ["embeddings"])
        _append_scoring(model, network)
    else:
        model = _export_module(network, network.input_hw, list(OUTPUT_NAMES))
    onnx.checker.check_model(model, full_check=True)
    return model


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
    return _export_module(backbone, input_hw, [f"stride{stride}" for stride in backbone.strides])


def _export_module(module: nn.Module, input_hw: tuple[int, int], output_names: list[str]) -> onnx.ModelProto:
    example = torch.zeros((2, *input_hw, 3), dtype=torch.uint8)
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["frames"],
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
