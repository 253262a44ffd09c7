"""EvenLight in every instruction set, as ONNX Runtime's operator and as a function body, against the definition."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
Frames = NDArray[np.uint8]

KINDS = [
    "noise", "gradient", "low contrast", "flat", "black", "white", "one bright value", "large",
    "sizes that fit nothing", "one pixel",
]  # fmt: skip
# Of networks that take all colours alike, and of those that do not.
PARAMETERS: dict[str, dict[str, Any]] = {
    "one number": {"shift": [127.5], "scale": [1 / 127.5]},
    "per colour": {"shift": [123.675, 116.28, 103.53], "scale": [1 / 58.395, 1 / 57.12, 1 / 57.375]},
}
for parameters in PARAMETERS.values():
    parameters |= {"mean": 115.0, "spread": 45.0, "smallest_spread": 5.0}


def largest_value(shift: list[float], scale: list[float], **_: Any) -> float:
    return float(np.abs(np.outer([0.0, 255.0], np.ones(len(shift))) - shift).max() * max(scale))


@pytest.fixture(params=PARAMETERS.values(), ids=PARAMETERS)
def parameters(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(params=KINDS)
def frames(request: pytest.FixtureRequest, even_light_frames: dict[str, Frames]) -> Frames:
    return even_light_frames[request.param]


@pytest.fixture
def expected(
    frames: Frames, parameters: dict[str, Any], even_light_reference: Callable[..., Any]
) -> NDArray[np.float64]:
    rounded = {name: np.asarray(value, np.float32).astype(np.float64) for name, value in parameters.items()}
    return np.asarray(even_light_reference(frames, **rounded))


def check(result: NDArray[np.float32], expected: NDArray[np.float64], parameters: dict[str, Any]) -> None:
    """Within three roundings of the largest value."""
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    largest = largest_value(**parameters)
    np.testing.assert_allclose(result, expected, rtol=0, atol=3 * np.finfo(np.float32).eps / 2 * largest)


Run = Callable[..., NDArray[np.float32] | None]


def compile_run(compiler: str, folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> Run:
    program = folder / "even_light_run"
    sources = [ROOT / "tests" / "kernels" / "even_light_run.cpp", *(ROOT / "kernels" / "cpu").glob("*.cpp")]
    common = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *common, *flags, *sources, "-o", program], check=True)

    def run(
        frames: Frames, parameters: dict[str, Any], instruction_set: str = "baseline", pixels_at_a_time: int = 1 << 40
    ) -> NDArray[np.float32] | None:
        images, height, width, _ = frames.shape
        shift, scale = (np.broadcast_to(parameters[name], 3) for name in ("shift", "scale"))
        scalars = (parameters[name] for name in ("mean", "spread", "smallest_spread"))
        message = struct.pack("=2q9f", images, height * width, *scalars, *shift, *scale) + bytes(4) + frames.tobytes()
        done = subprocess.run(
            [*launcher, program, instruction_set, str(pixels_at_a_time)],
            input=message,
            capture_output=True,
            env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        )
        if done.returncode == 3:
            return None
        assert done.returncode == 0, done.stderr.decode()
        return np.frombuffer(done.stdout, np.float32).reshape(images, 3, height, width)

    return run


@pytest.fixture(scope="session")
def sanitized(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    flags = ["-O3", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return compile_run(cxx, tmp_path_factory.mktemp("even-light"), *flags)


@pytest.fixture(scope="session")
def on_aarch64(tmp_path_factory: pytest.TempPathFactory) -> Run:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs the packages g++-aarch64-linux-gnu and qemu-user-static")
    return compile_run(compiler, tmp_path_factory.mktemp("even-light-aarch64"), "-O3", "-static", launcher=(emulator,))


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_the_definition(
    instruction_set: str, frames: Frames, parameters: dict[str, Any], expected: NDArray[np.float64], sanitized: Run
) -> None:
    result = sanitized(frames, parameters, instruction_set)
    if result is None:
        pytest.skip(f"this processor has no {instruction_set}")
    check(result, expected, parameters)
    in_pieces = sanitized(frames, parameters, instruction_set, pixels_at_a_time=77)
    np.testing.assert_array_equal(in_pieces, result)


def test_agrees_with_the_definition_on_aarch64(
    frames: Frames, parameters: dict[str, Any], expected: NDArray[np.float64], on_aarch64: Run
) -> None:
    result = on_aarch64(frames, parameters)
    assert result is not None
    check(result, expected, parameters)
    np.testing.assert_array_equal(on_aarch64(frames, parameters, pixels_at_a_time=77), result)


class Op:
    """The node in ONNX Runtime, alone in a graph."""

    def __init__(
        self, library: Path | None, parameters: dict[str, Any], *, threads: int = 1, body: bool = True
    ) -> None:
        onnx = pytest.importorskip("onnx", reason="onnx makes the one-node model; install the extra export")
        import onnxruntime as ort

        helper = onnx.helper
        functions = []
        if body:
            pytest.importorskip("torch", reason="the exporter needs torch; install the extra train")
            from meliad_edge.export.even_light_function import even_light_function

            functions = [even_light_function()]
        model = helper.make_model(
            helper.make_graph(
                [helper.make_node("EvenLight", ["frames"], ["images"], domain="meliad", **parameters)],
                "one_node",
                [helper.make_tensor_value_info("frames", onnx.TensorProto.UINT8, ["n", "h", "w", "c"])],
                [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, None)],
            ),
            opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("meliad", 1)],
            ir_version=10,
            functions=functions,
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        if library is not None:
            options.register_custom_ops_library(str(library))
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, frames: Frames) -> NDArray[np.float32]:
        return np.asarray(self.session.run(None, {"frames": frames})[0])


@pytest.fixture
def library(onnxruntime_op: Any) -> Path:
    return Path(onnxruntime_op.library)


def test_the_operator_agrees_with_the_definition(
    frames: Frames, parameters: dict[str, Any], expected: NDArray[np.float64], library: Path
) -> None:
    check(Op(library, parameters, body=False)(frames), expected, parameters)


@pytest.mark.workshop
def test_the_body_agrees_with_the_definition(
    frames: Frames, parameters: dict[str, Any], expected: NDArray[np.float64]
) -> None:
    """It sums squares in single precision: of a large image the spread is off by a ten-thousandth."""
    np.testing.assert_allclose(Op(None, parameters)(frames), expected, rtol=0, atol=2e-4 * largest_value(**parameters))


@pytest.mark.workshop
def test_the_kernel_takes_the_node_from_the_body(library: Path, even_light_frames: dict[str, Frames]) -> None:
    frames, parameters = even_light_frames["noise"], PARAMETERS["per colour"]
    with_kernel = Op(library, parameters)(frames)
    np.testing.assert_array_equal(with_kernel, Op(library, parameters, body=False)(frames))
    assert (with_kernel != Op(None, parameters)(frames)).any()


def test_neither_threads_nor_the_batch_change_a_bit(library: Path) -> None:
    random = np.random.default_rng(3)
    frames = random.integers(0, 256, (5, 224, 256, 3), np.uint8) // np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1)
    parameters = PARAMETERS["one number"]
    one_by_one = np.concatenate([Op(library, parameters, body=False)(frame[np.newaxis]) for frame in frames])
    for threads in (1, 2, 3):
        op = Op(library, parameters, threads=threads, body=False)
        for _ in range(5):
            np.testing.assert_array_equal(op(frames), one_by_one)
        np.testing.assert_array_equal(op(frames[3:4]), one_by_one[3:4])


def test_every_instruction_set_is_to_be_had_in_onnx_runtime(
    library: Path, even_light_frames: dict[str, Frames], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, parameters = even_light_frames["gradient"], PARAMETERS["one number"]
    best = Op(library, parameters, body=False)(frames)
    for name in ("baseline", "avx2", "avx512"):
        monkeypatch.setenv("MELIAD_EDGE_INSTRUCTION_SET", name)
        np.testing.assert_allclose(Op(library, parameters, body=False)(frames), best, rtol=0, atol=3e-7)


def test_an_empty_batch_has_empty_planes(library: Path) -> None:
    op = Op(library, PARAMETERS["one number"], body=False)
    assert op(np.zeros((0, 32, 64, 3), np.uint8)).shape == (0, 3, 32, 64)
    assert op(np.zeros((2, 0, 64, 3), np.uint8)).shape == (2, 3, 0, 64)


def test_shapes_are_inferred(library: Path) -> None:
    (images,) = Op(library, PARAMETERS["one number"], body=False).session.get_outputs()
    assert (images.shape, images.type) == (["n", 3, "h", "w"], "tensor(float)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smallest_spread": 0.0}, "EvenLight: smallest_spread is 0.000000; it must be positive and finite"),
        ({"spread": float("inf")}, "EvenLight: mean, spread, shift and scale must be finite"),
        ({"scale": [1.0, float("nan"), 1.0]}, "EvenLight: mean, spread, shift and scale must be finite"),
        ({"shift": [1.0, 2.0]}, "EvenLight: shift has 2 values; it must have 1 or 3"),
    ],
)
def test_impossible_parameters_are_refused_when_the_model_is_loaded(
    change: dict[str, Any], message: str, library: Path
) -> None:
    with pytest.raises(Exception, match=message):
        Op(library, PARAMETERS["one number"] | change, body=False)


def test_frames_without_three_colours_are_refused(library: Path) -> None:
    with pytest.raises(Exception, match=r"EvenLight: frames has shape \[1, 3, 32, 32\], expected \[N, H, W, 3\]"):
        Op(library, PARAMETERS["one number"], body=False)(np.zeros((1, 3, 32, 32), np.uint8))


@pytest.mark.workshop
@pytest.mark.parametrize("backbone_name", ["tf_efficientnet_lite0", "resnet18"])
def test_the_node_of_a_backbone_does_what_the_backbone_does(
    backbone_name: str, library: Path, even_light_frames: dict[str, Frames], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from onnx import helper

    from meliad_edge.export.even_light_function import even_light_node
    from meliad_edge.models.backbone import Backbone

    backbone = Backbone(backbone_name, even_light=True).eval()
    node = even_light_node("frames", "images", backbone)
    op = Op(library, {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute})
    monkeypatch.setattr(backbone, "levels_of_images", lambda images: (images,))
    for frames in even_light_frames.values():
        (images,) = backbone(torch.from_numpy(frames))
        np.testing.assert_allclose(op(frames), images.numpy(), rtol=0, atol=5e-5)
