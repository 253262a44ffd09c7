from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from meliad_edge.bundle import open_bundle
from meliad_edge.data.images import read_image
from meliad_edge.errors import BundleError, ParityError
from meliad_edge.export import even_light_function
from meliad_edge.export.graph import IR_VERSION, OPSET, export_graph
from meliad_edge.export.scoring_function import DOMAIN, OPERATOR
from meliad_edge.export.to_bundle import export_bundle
from meliad_edge.run import Run, load_run
from meliad_edge.runtime.onnxruntime_engine import OUTPUT_NAMES, OnnxRuntimeEngine
from meliad_edge.runtime.torch_engine import TorchEngine

LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@pytest.fixture(scope="module")
def run(run_folder: Path) -> Run:
    return load_run(run_folder)


@pytest.fixture(scope="module")
def model(bundle_file: Path) -> bytes:
    return open_bundle(bundle_file).models["fp32"]


@pytest.fixture(scope="module")
def frames(texture_set: Path) -> NDArray[np.uint8]:
    return np.stack([read_image(path) for path in sorted((texture_set / "test").rglob("00[12].png"))])


def test_the_graph_is_what_the_design_says(model: bytes, run: Run) -> None:
    proto = onnx.load_model_from_string(model)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == IR_VERSION
    assert {opset.domain: opset.version for opset in proto.opset_import} == {"": OPSET, DOMAIN: 1}
    ours = [even_light_function.OPERATOR, OPERATOR]
    assert [(function.domain, function.name) for function in proto.functions] == [(DOMAIN, name) for name in ours]
    assert [node.op_type for node in proto.graph.node if node.domain == DOMAIN] == ours
    assert [proto.graph.node[index].op_type for index in (0, -1)] == ours
    (frames,) = proto.graph.input
    assert frames.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    batch, *rest = frames.type.tensor_type.shape.dim
    assert batch.dim_param
    assert [side.dim_value for side in rest] == [128, 128, 3]
    assert tuple(output.name for output in proto.graph.output) == OUTPUT_NAMES
    assert str(Path(__file__).parents[2]).encode() not in model


def test_a_network_that_sees_pixels_as_they_are_has_no_node_of_even_light(run: Run, frames: NDArray[np.uint8]) -> None:
    other: Any = copy.deepcopy(run.network)
    other.backbone.even_light = False
    proto = export_graph(other)
    assert [node.op_type for node in proto.graph.node if node.domain == DOMAIN] == [OPERATOR]
    assert [function.name for function in proto.functions] == [OPERATOR]
    score = OnnxRuntimeEngine(proto.SerializeToString()).infer(frames).score
    unit = run.calibration.threshold - float(np.median(run.calibration.scores))
    np.testing.assert_allclose(score, TorchEngine(other).infer(frames).score, atol=0.01 * unit)
    assert np.abs(score - TorchEngine(run.network).infer(frames).score).max() > 0.1 * unit


@pytest.mark.parametrize("level", LEVELS)
def test_every_optimisation_level_agrees_with_torch(
    level: str, model: bytes, run: Run, frames: NDArray[np.uint8]
) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    score, evidence, nearest = session.run(OUTPUT_NAMES, {"frames": frames})
    expected = TorchEngine(run.network).infer(frames)
    unit = run.calibration.threshold - float(np.median(run.calibration.scores))
    np.testing.assert_allclose(score, expected.score, atol=0.01 * unit)
    np.testing.assert_allclose(evidence, expected.map, atol=0.02 * unit)
    assert (nearest == expected.nearest).mean() > 0.99


@pytest.mark.parametrize("batch", range(1, 6))
def test_the_batch_does_not_matter(batch: int, model: bytes, frames: NDArray[np.uint8]) -> None:
    engine = OnnxRuntimeEngine(model)
    one_by_one = np.concatenate([engine.infer(frame[np.newaxis]).score for frame in frames[:batch]])
    together = engine.infer(frames[:batch])
    assert together.map.shape[0] == together.nearest.shape[0] == batch
    np.testing.assert_allclose(together.score, one_by_one, rtol=1e-4, atol=1e-4)


def test_the_fitted_network_is_interpretable_by_design(run: Run, frames: NDArray[np.uint8]) -> None:
    raw = TorchEngine(run.network).infer(frames)
    top = np.sort(raw.map.reshape(len(frames), -1), axis=1)[:, -run.network.top_cells :].mean(axis=1)
    np.testing.assert_allclose(raw.score - run.network.score_offset, top, rtol=1e-5, atol=1e-4)


def test_embedding_level_by_level_is_embedding_of_the_whole_feature(run: Run, frames: NDArray[np.uint8]) -> None:
    """Average, concatenate, whiten, damp, even out, deviate: the formula of the documentation, written out."""
    network: Any = run.network
    with torch.inference_mode():
        finer, fine, coarse = network.backbone(torch.from_numpy(frames))
        pool = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        coarse = torch.nn.functional.interpolate(
            pool(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False
        )
        features = torch.cat([pool(fine), coarse], dim=1)
        matrix = torch.cat([network.metric_fine.weight, network.metric_coarse.weight], dim=1)[:, :, 0, 0]
        whitened = torch.einsum("dc,nchw->ndhw", matrix, features) + network.metric_fine.bias[:, None, None]
        length = whitened.norm(dim=1, keepdim=True) / network.typical_length
        expected = whitened * length.clamp_min(0.05) ** -0.75 * network.place_scale
        at_place = torch.cat([torch.nn.functional.avg_pool2d(finer, 2), fine], dim=1)
        projection = torch.cat([4.0 * network.place_finer.weight[:, :, :1, :1], network.place_fine.weight], dim=1)
        deviation = torch.einsum("dc,nchw->ndhw", projection[:, :, 0, 0], at_place) - network.place_mean
        main = network.place_main.view(*network.grid_hw, *network.place_main.shape[1:])
        in_main = torch.einsum("hwdk,ndhw->nkhw", main, deviation)
        rest = deviation.square().sum(1) - in_main.square().sum(1)
        of_place = 0.01 * (rest * network.place_precision.view(network.grid_hw)).sqrt()
        embedded = network.embed(network.backbone(torch.from_numpy(frames)))
    scale = float(expected.abs().max())
    assert torch.allclose(embedded[:, :-8], expected, atol=1e-4 * scale)
    assert torch.allclose(embedded[:, -8], of_place, atol=1e-4)


def test_a_model_that_decides_otherwise_is_not_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph comes from a network with other prototypes than the reference."""
    other: Any = copy.deepcopy(run.network)
    other.prototypes.data *= 0.5
    monkeypatch.setattr("meliad_edge.export.to_bundle.export_graph", lambda network: export_graph(other))
    with pytest.raises(ParityError, match="does not decide as the trained model"):
        export_bundle(run, tmp_path / "x.meliad")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }',
        '<ir_version: 8, opset_import: ["" : 17]> g (uint8[N, H, W, 3] frames) => (uint8[N, H, W, 3] score_raw)'
        " { score_raw = Identity(frames) }",
    ],
)
def test_a_graph_of_somebody_else_is_refused(text: str) -> None:
    foreign = onnx.parser.parse_model(text).SerializeToString()
    with pytest.raises(BundleError, match="not a model of ours"):
        OnnxRuntimeEngine(foreign)


@pytest.mark.parametrize("data", [b"", b"no graph", bytes(1000)])
def test_what_is_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="refuses the graph") as caught:
        OnnxRuntimeEngine(data)
    assert "\n" not in str(caught.value)
