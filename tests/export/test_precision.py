"""FP16 and INT8: what is lowered, what is not, and that nothing ships that decides otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper, parser

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.errors import ParityError
from meliad_edge.export.half import emulate_fp16, to_fp16
from meliad_edge.export.lower import Replay, _best_shift, _slope, lower
from meliad_edge.export.portable import to_portable
from meliad_edge.export.quantize import Quantizer
from meliad_edge.export.region import layers, low_precision_region
from meliad_edge.export.to_bundle import read_replay
from meliad_edge.precision import PRECISIONS, ParityLimits, Precision
from meliad_edge.run import load_run
from meliad_edge.runtime.engine import infer_all
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine

pytestmark = pytest.mark.workshop


@pytest.fixture(scope="module")
def bundle(precise_bundle: Path) -> Bundle:
    return open_bundle(precise_bundle)


@pytest.fixture(scope="module")
def replay(run_folder: Path) -> Replay:
    return read_replay(load_run(run_folder)).replay


@pytest.fixture
def toy() -> ModelProto:
    """Pixels are clipped and added before the first convolution; after the last a sum with something else follows."""
    model = parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        toy (float[1, 3, 8, 8] frames) => (float[1, 4, 8, 8] y)
        <float low = {0.0}, float six = {6.0}>
        {
            clipped = Clip(frames, low, six)
            doubled = Add(clipped, clipped)
            first = Conv<pads = [1, 1, 1, 1]>(doubled, first_weight)
            active = Clip(first, low, six)
            second = Conv(active, second_weight)
            joined = Add(second, active)
            outside = Exp(frames)
            pooled = ReduceMean<keepdims = 1>(outside)
            y = Add(joined, pooled)
        }
        """
    )
    random = np.random.default_rng(3)
    for name, shape in (("first_weight", (4, 3, 3, 3)), ("second_weight", (4, 4, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name))
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


def test_only_convolutions_and_what_passes_their_results_on_are_lowered(toy: ModelProto) -> None:
    assert [node.output[0] for node in low_precision_region(toy)] == ["first", "active", "second", "joined"]
    assert [(layer.name, layer.output) for layer in layers(toy)] == [
        ("first_weight", "active"),
        ("second_weight", "second"),
    ]


def test_half_precision_rounds_weights_and_activations(toy: ModelProto, run_graph: Callable[..., Any]) -> None:
    frames = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    exact, half = run_graph(toy, frames), run_graph(to_fp16(toy), frames)
    error = np.abs(half - exact).max()
    assert 1e-6 < error < 0.02 * np.abs(exact).max()


def test_emulated_half_precision_rounds_what_a_gpu_rounds(toy: ModelProto, run_graph: Callable[..., Any]) -> None:
    """Step by step in NumPy, whose half precision is real."""

    def half(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values.astype(np.float16).astype(np.float64)

    frames = np.random.default_rng(7).normal(2.0, 2.0, size=(1, 3, 8, 8)).astype(np.float32)
    weights = {item.name: half(numpy_helper.to_array(item)) for item in toy.graph.initializer if "weight" in item.name}
    padded = np.pad(half(2.0 * frames.clip(0.0, 6.0)), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    active = half(np.einsum("ncyxuv,ocuv->noyx", windows, weights["first_weight"]).clip(0.0, 6.0))
    second = half(np.einsum("ncyx,oc->noyx", active, weights["second_weight"][:, :, 0, 0]))
    expected = half(second + active) + np.exp(frames.astype(np.float64)).mean(axis=(1, 2, 3), keepdims=True)
    emulated, exact = run_graph(emulate_fp16(toy), frames), run_graph(toy, frames)
    # A value on the border between two half-precision numbers may go either way.
    off = np.abs(emulated - expected) > 1e-5
    assert off.mean() < 0.02
    assert np.abs(emulated - expected).max() < 0.02
    assert np.abs(emulated - exact).mean() > 10 * np.abs(emulated - expected).mean()


def test_emulation_keeps_what_is_kept(toy: ModelProto, run_graph: Callable[..., Any]) -> None:
    frames = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    kept = [node.name for node in toy.graph.node]
    np.testing.assert_array_equal(run_graph(emulate_fp16(toy, kept), frames), run_graph(toy, frames))


def test_half_precision_has_no_weights_to_round(bundle: Bundle) -> None:
    """The trained network already holds what half precision can."""
    exact, half = (onnx.load_model_from_string(bundle.models[p]) for p in ("fp32", "fp16"))
    constants = {item.name: numpy_helper.to_array(item) for item in exact.graph.initializer}
    lowered = [item for item in half.graph.initializer if item.name.endswith("_fp16")]
    assert len(lowered) > 90
    for item in lowered:
        original = constants[item.name.removesuffix("_fp16")]
        np.testing.assert_allclose(numpy_helper.to_array(item), original, rtol=1e-6, atol=1e-6, err_msg=item.name)


def test_export_checks_half_precision_as_a_gpu_computes_it(precise_export: dict[str, Any]) -> None:
    (emulated,) = (row for row in precise_export["parity"] if row["engine"] == "emulated half")
    assert emulated["precision"] == "fp16"
    assert 1e-5 < emulated["score_error"] < 0.05


def test_no_convolution_in_fp32_stands_between_quantised_tensors(toy: ModelProto) -> None:
    """ONNX Runtime would round its weights, all channels with one scale."""
    chain = parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        chain (uint8[batch, 8, 8, 4] frames) => (float[batch, 4, 8, 8] y)
        <float low = {0.0}, float six = {6.0}>
        {
            floats = Cast<to = 1>(frames)
            x = Transpose<perm = [0, 3, 1, 2]>(floats)
            a = Conv(x, weight_a)
            b = Conv(a, weight_b)
            active = Clip(b, low, six)
            c = Conv(active, weight_c)
            d = Conv(c, weight_d)
            e = Conv(d, weight_e)
            y = Neg(e)
        }
        """
    )
    random = np.random.default_rng(9)
    for letter in "abcde":
        # Channels of very different size, as depthwise layers have them.
        weight = random.normal(size=(4, 4, 1, 1)) * np.array([0.001, 0.01, 0.1, 1.0]).reshape(4, 1, 1, 1)
        chain.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), f"weight_{letter}"))
    for node in chain.graph.node:
        node.name = node.output[0]
    frames = random.integers(0, 256, (4, 8, 8, 4), dtype=np.uint8)
    quantized = Quantizer(chain, frames).quantize(["b", "active"])
    weights = {node.name: node.input[1] for node in quantized.graph.node if node.op_type == "Conv"}
    assert {name for name, weight in weights.items() if weight == f"weight_{name}"} == {"b", "c"}


def test_what_is_kept_is_not_changed(toy: ModelProto, run_graph: Callable[..., Any]) -> None:
    frames = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    kept = [node.name for node in toy.graph.node]
    np.testing.assert_array_equal(run_graph(to_fp16(toy, kept), frames), run_graph(toy, frames))
    weights = {initializer.name: initializer.data_type for initializer in to_fp16(toy, kept[:4]).graph.initializer}
    assert weights["first_weight"] == onnx.TensorProto.FLOAT
    assert weights["second_weight_fp16"] == onnx.TensorProto.FLOAT16


def test_the_bundle_carries_every_precision(bundle: Bundle, precise_bundle: Path, invoke: Callable[..., Any]) -> None:
    assert list(bundle.models) == list(PRECISIONS)
    assert len(bundle.models["int8"]) < len(bundle.models["fp16"]) < len(bundle.models["fp32"])
    outcome = invoke("check", precise_bundle, "--json")
    assert outcome.code == 0, outcome.err
    assert [(engine["precision"], engine["passed"]) for engine in outcome.json["engines"]] == [
        (precision, True) for precision in PRECISIONS
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_and_outputs_are_those_of_fp32(precision: Precision, bundle: Bundle) -> None:
    reference, lowered = (onnx.load_model_from_string(bundle.models[p]).graph for p in ("fp32", precision))
    assert list(lowered.input) == list(reference.input)
    assert list(lowered.output) == list(reference.output)


def test_the_entropy_part_of_fp16_is_in_fp32(bundle: Bundle) -> None:
    model = onnx.load_model_from_string(bundle.models["fp16"])
    constants = {initializer.name: initializer.data_type for initializer in model.graph.initializer}
    (scoring,) = (node for node in model.graph.node if node.op_type == "PatchEntropyScore")
    assert {constants[name] for name in scoring.input[1:]} == {onnx.TensorProto.FLOAT}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {constants[node.input[1]] for node in convolutions} == {onnx.TensorProto.FLOAT16}


def test_int8_is_written_as_pairs_around_all_but_the_most_sensitive_layers(bundle: Bundle) -> None:
    model = onnx.load_model_from_string(bundle.models["int8"])
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    quantized = [node for node in convolutions if made_by.get(node.input[1]) == "DequantizeLinear"]
    assert len(convolutions) // 2 <= len(quantized) <= len(convolutions) - 3
    assert all(made_by[node.input[0]] == "DequantizeLinear" for node in quantized)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_predict_decides_in_the_precision_asked_for(
    precision: Precision, bundle: Bundle, precise_bundle: Path, texture_set: Path, invoke: Callable[..., Any]
) -> None:
    images = sorted(texture_set.glob("test/*/*.png"))
    said = {}
    for name in ("fp32", precision):
        outcome = invoke("predict", precise_bundle, *images, "--precision", name, "--json")
        assert outcome.code == 0, outcome.err
        assert (outcome.json["precision"], outcome.json["model_sha256"]) == (name, bundle.model_sha256(name))
        said[name] = outcome.json["predictions"]
    for lowered, reference in zip(said[precision], said["fp32"], strict=True):
        limit = bundle.manifest.precisions[precision].score * bundle.calibration.spread
        assert lowered["decision"] == reference["decision"]
        # Far beyond the threshold, where drawn defects are, rounding is a share of the score.
        assert lowered["score"] == pytest.approx(reference["score"], abs=limit, rel=0.05)
    assert said[precision] != said["fp32"]


def test_int8_is_what_a_processor_runs_by_default(
    precise_bundle: Path, bundle_file: Path, texture_set: Path, invoke: Callable[..., Any]
) -> None:
    image = texture_set / "test" / "good" / "000.png"
    assert invoke("predict", precise_bundle, image, "--json").json["precision"] == "int8"
    assert invoke("predict", bundle_file, image, "--json").json["precision"] == "fp32"
    outcome = invoke("predict", bundle_file, image, "--precision", "int8")
    assert outcome.code == 5
    assert outcome.error_line == ("the bundle carries no int8 graph, only fp32; export it with --precision int8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_portable_graph_gives_the_same_in_standard_operators(
    precision: Precision, bundle: Bundle, replay: Replay
) -> None:
    portable = to_portable(bundle.models[precision])
    model = onnx.load_model_from_string(portable)
    assert not model.functions
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx"}
    ours = OnnxRuntimeEngine(bundle.models[precision], use_kernel=False).infer(replay.frames)
    theirs = OnnxRuntimeEngine(portable, use_kernel=False).infer(replay.frames)
    tolerance = 1e-3 * bundle.calibration.spread
    np.testing.assert_allclose(theirs.score, ours.score, atol=tolerance)
    np.testing.assert_allclose(theirs.map, ours.map, atol=10 * tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_agrees(precision: Precision, bundle: Bundle, replay: Replay) -> None:
    pytest.importorskip("openvino", reason="install the extra openvino")
    from meliad_edge.runtime.openvino_engine import OpenVinoEngine

    engine = OpenVinoEngine(to_portable(bundle.models[precision]))
    assert engine.input_size_hw == bundle.manifest.input_hw
    raw = infer_all(engine, replay.frames, "openvino", batch_size=3)
    threshold = replay.calibration.threshold
    np.testing.assert_array_equal(raw.score >= threshold, replay.reference.score >= threshold)
    limit = bundle.manifest.precisions[precision].score * bundle.calibration.spread
    np.testing.assert_allclose(raw.score, replay.reference.score, atol=limit)
    assert raw.nearest.dtype == np.int64


def test_export_writes_a_portable_file(run_folder: Path, tmp_path: Path, invoke: Callable[..., Any]) -> None:
    out = tmp_path / "deep" / "model.onnx"
    outcome = invoke("export", run_folder, "--format", "onnx", "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    assert {node.domain for node in onnx.load(out).graph.node} <= {"", "ai.onnx"}
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    assert OnnxRuntimeEngine(out.read_bytes()).input_size_hw == (128, 128)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--precision", "int4"), "--precision int4: choose one of fp32, fp16, int8"),
        (("--precision", "fp8"), "--precision fp8: choose one of fp32, fp16, int8"),
        (("--format", "onnx", "--precision", "fp16", "--precision", "int8"), "--format onnx writes one graph"),
    ],
)
def test_what_cannot_be_asked_for(
    arguments: tuple[str, ...], says: str, run_folder: Path, invoke: Callable[..., Any]
) -> None:
    outcome = invoke("export", run_folder, *arguments)
    assert outcome.code == 2
    assert outcome.error_line.startswith(says)


def test_a_precision_that_loses_too_much_is_refused_with_the_reason(bundle: Bundle, replay: Replay) -> None:
    model = onnx.load_model_from_string(bundle.models["fp32"])
    with pytest.raises(ParityError) as caught:
        lower(model, "fp16", replay.frames, replay, ParityLimits(score=1e-9, map=1e-9))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("fp16 is refused: even with the first half of 52 layers in FP32, ")
    assert "score error" in line
    assert "most is lost in " in line
    assert "[limits.fp16]" in line


def test_a_graph_without_convolutions_is_refused(replay: Replay) -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[1, 3] frames) => (float[1, 3] y) { y = Exp(frames) }'
    )
    with pytest.raises(ParityError, match="int8 is refused: the graph has no convolutions"):
        lower(model, "int8", replay.frames, replay, ParityLimits(score=1.0, map=1.0))


def test_export_prints_nothing_but_json_where_json_is_asked_for(
    small_run: Path, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    outcome = invoke("export", small_run, "--precision", "fp16", "--out", tmp_path / "small.meliad", "--json")
    assert outcome.code == 0, outcome.err
    assert len(outcome.json["layers"]["fp16"]) == 52
    assert {result["precision"] for result in outcome.json["parity"]} == {"fp32", "fp16"}


def test_quantising_the_same_graph_again_gives_the_same_bytes(bundle: Bundle, replay: Replay) -> None:
    model = onnx.load_model_from_string(bundle.models["fp32"])
    first, second = (
        Quantizer(model, replay.frames[:4]).quantize().SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_the_slope_is_that_of_the_nearest_line() -> None:
    random = np.random.default_rng(5)
    scores = random.normal(size=200).astype(np.float32)
    reference = (1.25 * scores - 3.0 + 0.01 * random.normal(size=200)).astype(np.float32)
    assert _slope(scores, reference) == pytest.approx(1.25, abs=0.01)
    assert _slope(np.ones(3, np.float32), reference[:3]) == 1.0


def test_a_shift_keeps_every_decision_where_one_can() -> None:
    random = np.random.default_rng(6)
    for _ in range(100):
        reference = random.normal(size=30).astype(np.float32)
        threshold = float(np.sort(reference)[-4:-2].mean())
        scores = reference + np.float32(random.normal() * 0.3) + random.normal(size=30).astype(np.float32) * 0.02
        shift = _best_shift(reference, scores, threshold, spread=1.0)
        is_alarm = reference >= threshold
        if scores[is_alarm].min() > scores[~is_alarm].max():
            np.testing.assert_array_equal(scores + shift >= threshold, is_alarm)
    normal = np.array([0.0, 1.0], np.float32)
    assert _best_shift(normal, normal + 0.5, 5.0, spread=1.0) == pytest.approx(-0.5)
