from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.inliner import inline_selected_functions

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.errors import BundleError
from meliad_edge.export.half import to_fp16
from meliad_edge.export.tensorrt_graph import to_tensorrt
from meliad_edge.runtime.kernel_library import find_kernel_library

pytestmark = pytest.mark.workshop

SHAPE = (2, 4, 6, 3)


@pytest.fixture(scope="module")
def bundle(bundle_file: Path) -> Bundle:
    return open_bundle(bundle_file)


@pytest.fixture
def frames() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


def make_model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray[Any]] | None = None,
    outputs: tuple[str, ...] = ("out",),
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, ["batch", *SHAPE[1:]])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        initializer=[numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
        value_info=[helper.make_tensor_value_info("planes", TensorProto.UINT8, [None] * 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def execute(model: bytes, frames: NDArray[np.uint8]) -> list[NDArray[Any]]:
    onnx.checker.check_model(onnx.load_model_from_string(model))
    options = ort.SessionOptions()
    # Optimisations would execute equal graphs in different orders.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if library := find_kernel_library():
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"frames": frames}))


def op_types(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_model_from_string(model).graph.node]


def transpose() -> onnx.NodeProto:
    return helper.make_node("Transpose", ["frames"], ["planes"], name="transpose", perm=[0, 3, 1, 2])


def cast(source: str, target: str, to: int = TensorProto.FLOAT) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_exported_model_scores_the_same_without_body_and_cast_first(precision: str, bundle: Bundle) -> None:
    if find_kernel_library() is None:
        pytest.skip("no libmeliad_ort.so: without the function body only the kernel can execute the model")
    model = bundle.models["fp32"]
    if precision == "fp16":
        model = to_fp16(onnx.load_model_from_string(model)).SerializeToString()
    rewritten = to_tensorrt(model)
    nodes = onnx.load_model_from_string(rewritten).graph.node
    (cast,) = (node for node in nodes if "frames" in node.input)
    (transpose,) = (node for node in nodes if cast.output[0] in node.input)
    assert (cast.op_type, transpose.op_type) == ("Cast", "Transpose")
    assert [node.op_type for node in nodes if node.domain] == ["PatchEntropyScore"]
    assert not onnx.load_model_from_string(rewritten).functions
    golden = np.stack([frame.frame for frame in bundle.golden])
    # With the body of even light, as TensorRT executes it, and the kernel for the scoring node.
    model = inline_selected_functions(
        onnx.load_model_from_string(model), [("meliad", "EvenLight")], exclude=False
    ).SerializeToString()
    for expected, result in zip(execute(model, golden), execute(rewritten, golden), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_rewriting_twice_changes_nothing_more(bundle: Bundle) -> None:
    once = to_tensorrt(bundle.models["fp32"])
    assert to_tensorrt(once) == once


def test_every_cast_behind_the_frames_comes_first(frames: NDArray[np.uint8]) -> None:
    model = make_model(
        [
            transpose(),
            cast("planes", "a"),
            helper.make_node("Relu", ["a"], ["out"]),
            cast("planes", "half", TensorProto.FLOAT16),
            cast("half", "second"),
            cast("frames", "third"),
        ],
        outputs=("out", "second", "third"),
    )
    rewritten = to_tensorrt(model)
    assert op_types(rewritten) == ["Cast", "Transpose", "Relu", "Cast", "Transpose", "Cast", "Cast"]
    assert [value.name for value in onnx.load_model_from_string(rewritten).graph.value_info] == []
    for expected, result in zip(execute(model, frames), execute(rewritten, frames), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_frames_in_anything_else_are_refused() -> None:
    reshape = helper.make_node("Reshape", ["planes", "shape"], ["flat"])
    model = make_model([transpose(), reshape, cast("flat", "out")], {"shape": np.array([0, -1], np.int64)})
    with pytest.raises(BundleError, match="^Reshape takes frames as uint8, which TensorRT only casts; export"):
        to_tensorrt(model)


def quantised(zero_point: NDArray[Any]) -> bytes:
    """A convolution of one cell in INT8 with its bias as int32, as ONNX Runtime's quantiser writes it."""
    constants = {
        "scale": np.float32(2.0),
        "zero_point": zero_point,
        "weight": np.random.default_rng(1).integers(-127, 128, (5, 3, 1, 1)).astype(np.int8),
        "weight_scale": np.linspace(0.01, 0.05, 5, dtype=np.float32),
        "weight_zero_point": np.zeros(5, np.int8),
        "bias": np.arange(-2000, 3000, 1000, dtype=np.int32),
        "bias_scale": np.linspace(0.02, 0.1, 5, dtype=np.float32),
        "bias_zero_point": np.zeros(5, np.int32),
    }
    nodes = [
        cast("frames", "pixels"),
        helper.make_node("Transpose", ["pixels"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "scale", "zero_point"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero_point"], ["weight_dq"], axis=0),
        helper.make_node("DequantizeLinear", ["bias", "bias_scale", "bias_zero_point"], ["bias_dq"], axis=0),
        helper.make_node("Conv", ["x_dq", "weight_dq", "bias_dq"], ["out"]),
    ]
    return make_model(nodes, constants)


def test_biases_become_what_they_stand_for(frames: NDArray[np.uint8]) -> None:
    model = quantised(np.int8(0))
    rewritten = to_tensorrt(model)
    assert op_types(rewritten).count("DequantizeLinear") == 2
    constants = {constant.name: constant for constant in onnx.load_model_from_string(rewritten).graph.initializer}
    assert TensorProto.INT32 not in {constant.data_type for constant in constants.values()}
    assert {"bias", "bias_scale", "bias_zero_point"}.isdisjoint(constants)
    (expected,), (result,) = execute(model, frames), execute(rewritten, frames)
    assert np.ptp(expected) > 10
    # Whether the bias is added as an integer or not: one step of the accumulator apart at most.
    np.testing.assert_allclose(result, expected, atol=0.1)


@pytest.mark.parametrize("zero_point", [np.uint8(0), np.uint8(128), np.uint8(30), np.int8(-3), np.int8(-128)])
def test_bytes_around_a_zero_point_become_signed_bytes_for_the_same_range(
    zero_point: NDArray[Any], frames: NDArray[np.uint8]
) -> None:
    model = quantised(zero_point)
    rewritten = to_tensorrt(model)
    constants = {
        item.name: numpy_helper.to_array(item) for item in onnx.load_model_from_string(rewritten).graph.initializer
    }
    assert constants["zero_point"].dtype == np.int8
    assert constants["zero_point"] == 0
    span = np.iinfo(zero_point.dtype)
    # The scale was 2: what the bytes reached on the longer side, 127 steps reach now.
    reach = 2.0 * max(int(zero_point) - span.min, span.max - int(zero_point))
    np.testing.assert_allclose(127 * constants["scale"], reach, rtol=1e-6)
    # Pixels are whole numbers up to 255; half a step on either side, weighted, is how far results may move.
    (expected,), (result,) = execute(model, frames), execute(rewritten, frames)
    steps = 0.5 * (2.0 + float(constants["scale"]))
    weights = np.abs(constants["weight"].astype(np.float64)).reshape(5, -1).sum(axis=1) * constants["weight_scale"]
    inside = frames <= 2.0 * (span.max - int(zero_point))
    error = np.abs(result - expected)[np.broadcast_to(inside.all(axis=3)[:, None], result.shape)]
    assert error.size
    assert error.max() <= steps * weights.max() + 0.1


def test_bytes_that_end_at_zero_keep_their_activation() -> None:
    """ONNX Runtime's quantiser removes an activation where saturation does the same; signed bytes do not."""
    nodes = [
        cast("frames", "pixels"),
        helper.make_node("Sub", ["pixels", "middle"], ["x"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["x_q"], name="quantise"),
        helper.make_node("DequantizeLinear", ["x_q", "scale", "zero_point"], ["out"]),
    ]
    constants = {"middle": np.float32(100.0), "scale": np.float32(0.6), "zero_point": np.uint8(0)}
    frames = np.random.default_rng(2).integers(0, 256, SHAPE, np.uint8)
    (result,) = execute(to_tensorrt(make_model(nodes, constants)), frames)
    assert result.min() == 0.0
    np.testing.assert_allclose(result, np.clip(frames.astype(np.float32) - 100.0, 0.0, 153.0), atol=0.61)


def test_int8_scores_as_on_a_processor(precise_bundle: Path) -> None:
    if find_kernel_library() is None:
        pytest.skip("no libmeliad_ort.so: without the function body only the kernel can execute the model")
    bundle = open_bundle(precise_bundle)
    golden = np.stack([frame.frame for frame in bundle.golden])
    rewritten = to_tensorrt(bundle.models["int8"])
    constants = {item.name: item.data_type for item in onnx.load_model_from_string(rewritten).graph.initializer}
    assert TensorProto.UINT8 not in constants.values()
    expected, result = (execute(model, golden)[0] for model in (bundle.models["fp32"], rewritten))
    unit, limits = bundle.calibration.spread, bundle.manifest.precisions["int8"]
    assert np.abs(result - expected).max() <= limits.score * unit
    np.testing.assert_array_equal(result >= bundle.calibration.threshold, expected >= bundle.calibration.threshold)


@pytest.mark.parametrize("data", [b"no graph", b"\xff" * 100])
def test_what_is_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="^the graph is not an ONNX model") as caught:
        to_tensorrt(data)
    assert "\n" not in str(caught.value)


def test_a_device_needs_no_torch_for_it() -> None:
    code = "import sys, meliad_edge.export.tensorrt_graph; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
