from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.runtime.kernel_library import find_kernel_library

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Parameters:
    n_normal: int
    top_cells: int
    softness: float = 1.5
    normal_scale: float = 1.125
    anomaly_scale: float = 0.625
    bias: float = -0.375
    kappa: float = 0.4375
    offset: float = 0.25


@dataclass(frozen=True)
class Case:
    z: NDArray[np.float32]
    prototypes: NDArray[np.float32]
    direction: NDArray[np.float32]
    parameters: Parameters

    def but(self, **changes: Any) -> Case:
        """This case with other arrays or parameters."""
        arrays = {name: changes.pop(name) for name in ("z", "prototypes", "direction") if name in changes}
        return replace(self, **arrays, parameters=replace(self.parameters, **changes))


@dataclass(frozen=True)
class Outputs:
    score: NDArray[Any]
    map: NDArray[Any]
    nearest: NDArray[np.int64]

    def tobytes(self) -> bytes:
        return self.score.tobytes() + self.map.tobytes() + self.nearest.tobytes()


def _make_case(
    seed: int = 0,
    *,
    images: int = 2,
    depth: int = 33,
    height: int = 5,
    width: int = 7,
    prototypes: int = 40,
    n_normal: int = 29,
    top_cells: int = 4,
    **parameters: float,
) -> Case:
    random = np.random.default_rng(seed)
    return Case(
        z=random.normal(size=(images, depth, height, width)).astype(np.float32),
        prototypes=random.normal(size=(prototypes, depth)).astype(np.float32),
        direction=(random.normal(size=depth) / depth**0.5).astype(np.float32),
        parameters=Parameters(n_normal, top_cells, **parameters),
    )


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Fresh random inputs of any size."""
    return _make_case


@pytest.fixture(scope="session")
def reference() -> Callable[..., Outputs]:
    """The NumPy definition: float64, or float32 as the plain version the kernels are compared with."""
    module = _import_file(ROOT / "kernels" / "reference" / "patch_entropy.py")

    def run(case: Case, dtype: Any = np.float64) -> Outputs:
        outputs = module.patch_entropy_score(
            case.z, case.prototypes, case.direction, **asdict(case.parameters), dtype=dtype
        )
        return Outputs(*outputs)

    return run


@pytest.fixture(scope="session")
def even_light_reference() -> Callable[..., NDArray[np.float64]]:
    """The NumPy definition of EvenLight."""
    function: Callable[..., NDArray[np.float64]] = _import_file(
        ROOT / "kernels" / "reference" / "even_light.py"
    ).even_light
    return function


@pytest.fixture(scope="session")
def even_light_frames() -> dict[str, NDArray[np.uint8]]:
    """Frames of any kind, uint8 [N, H, W, 3]."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:96, :160]
    gradient = np.stack([60 + rows, 30 + columns, 200 - rows // 2], axis=-1) + random.normal(0, 3, (96, 160, 3))
    bright = np.full((1, 64, 32, 3), 7, np.uint8)
    bright[0, 40, 3, 1] = 255
    return {
        "noise": random.integers(0, 256, (3, 64, 64, 3), np.uint8),
        "gradient": gradient.clip(0, 255).astype(np.uint8)[np.newaxis],
        "low contrast": random.integers(100, 104, (2, 32, 96, 3), np.uint8),
        "flat": np.stack([np.full((32, 32, 3), level, np.uint8) for level in (1, 200, 254)]),
        "black": np.zeros((1, 32, 32, 3), np.uint8),
        "white": np.full((1, 256, 288, 3), 255, np.uint8),
        "one bright value": bright,
        "large": random.integers(0, 256, (1, 512, 480, 3), np.uint8) // 2 + 120,
        "sizes that fit nothing": random.integers(0, 90, (2, 19, 37, 3), np.uint8),
        "one pixel": np.array([[[[3, 90, 250]]]], np.uint8),
    }


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reference_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class OnnxRuntimeOp:
    """The custom operator as ONNX Runtime runs it, in a graph of that one node."""

    library: Path
    _sessions: dict[Any, Any] = field(default_factory=dict)

    def session(self, case: Case, *, threads: int = 1, constant_prototypes: bool = True) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(str(self.library))
        model = _one_node_model(case, constant_prototypes)
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, case: Case, *, threads: int = 1, constant_prototypes: bool = True) -> Outputs:
        session = self.session(case, threads=threads, constant_prototypes=constant_prototypes)
        inputs = {"z": case.z} if constant_prototypes else {"z": case.z, "prototypes": case.prototypes}
        return Outputs(*session.run(["score", "map", "nearest"], inputs))


def _one_node_model(case: Case, constant_prototypes: bool) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "PatchEntropyScore",
        ["z", "prototypes", "direction"],
        ["score", "map", "nearest"],
        domain="meliad",
        **asdict(case.parameters),
    )
    inputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", case.prototypes.shape[1], "h", "w"])]
    constants = [numpy_helper.from_array(case.direction, "direction")]
    if constant_prototypes:
        constants.append(numpy_helper.from_array(case.prototypes, "prototypes"))
    else:
        inputs.append(helper.make_tensor_value_info("prototypes", TensorProto.FLOAT, ["k", "d"]))
    outputs = [
        helper.make_tensor_value_info(name, type_, None)
        for name, type_ in [("score", TensorProto.FLOAT), ("map", TensorProto.FLOAT), ("nearest", TensorProto.INT64)]
    ]
    model = helper.make_model(
        helper.make_graph([node], "one_node", inputs, outputs, initializer=constants),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("meliad", 1)],
        ir_version=9,
    )
    return bytes(model.SerializeToString())


@pytest.fixture(scope="session")
def onnxruntime_op() -> OnnxRuntimeOp:
    pytest.importorskip("onnx", reason="onnx makes the one-node model; install the extra export")
    library = find_kernel_library()
    if library is None:
        pytest.skip("no libmeliad_ort.so: installing it needs a C++ compiler and ONNX Runtime headers")
    return OnnxRuntimeOp(library)


@pytest.fixture(scope="session")
def cxx() -> str:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None or shutil.which(compiler) is None:
        pytest.skip("no C++ compiler on this machine")
    return compiler


@dataclass
class KernelProgram:
    """patch_entropy_run.cpp with every C++ implementation, and the CUDA kernels as executed on the CPU."""

    path: Path
    launcher: tuple[str, ...] = ()

    def __call__(self, case: Case, implementation: str, *, seed: int = 0) -> Outputs | None:
        """Outputs for a case, None when this processor lacks the instruction set; fails on what a sanitizer finds."""
        done = self.run(case, implementation, seed=seed)
        if done.returncode == 3:
            return None
        assert done.returncode == 0, done.stderr.decode()
        images, _, height, width = case.z.shape
        score, evidence, nearest = np.split(
            np.frombuffer(done.stdout, np.uint8), [4 * images, 4 * images * (1 + height * width)]
        )
        return Outputs(
            score.view(np.float32),
            evidence.view(np.float32).reshape(images, height, width),
            nearest.copy().view(np.int64).reshape(images, 2, height, width),
        )

    def run(self, case: Case, implementation: str, *, seed: int = 0) -> subprocess.CompletedProcess[bytes]:
        """The finished process; the seed orders blocks and threads of the CUDA kernels."""
        images, depth, height, width = case.z.shape
        sizes = struct.pack("=4q", images, depth, height * width, len(case.prototypes))
        message = sizes + struct.pack("=2q6f", *asdict(case.parameters).values())
        message += case.z.tobytes() + case.prototypes.tobytes() + case.direction.tobytes()
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "MELIAD_ON_CPU_SEED": str(seed)}
        return subprocess.run(
            [*self.launcher, self.path, implementation], input=message, capture_output=True, env=environment
        )


_CUDA_SOURCE = ROOT / "kernels" / "cuda" / "patch_entropy.cu"
_RUN_SOURCES = (ROOT / "tests" / "kernels" / "patch_entropy_run.cpp", *(ROOT / "kernels" / "cpu").glob("*.cpp"))


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., KernelProgram]:
    """Compiles patch_entropy_run.cpp, warnings being errors."""

    def compile_program(
        compiler: str, *flags: str, cuda_source: Path = _CUDA_SOURCE, launcher: tuple[str, ...] = ()
    ) -> KernelProgram:
        program = tmp_path_factory.mktemp("kernels") / "patch_entropy_run"
        common = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-DMELIAD_CUDA_ON_CPU"]
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        sources = [*map(str, _RUN_SOURCES), "-x", "c++", str(cuda_source)]
        subprocess.run([compiler, *common, *warnings, *flags, *sources, "-o", str(program)], check=True)
        return KernelProgram(program, launcher)

    return compile_program


@pytest.fixture(scope="session")
def sanitized(cxx: str, compile_program: Callable[..., KernelProgram]) -> KernelProgram:
    """Compiled with the address and undefined-behaviour sanitizers."""
    return compile_program(cxx, "-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Precision:
    """Checks single-precision outputs against the definition in float64."""

    reference: Callable[..., Outputs]

    def check(self, outputs: Outputs, case: Case) -> None:
        """Error at most twice that of the plain float32 version, plus a few roundings where that one was lucky."""
        exact, plain = self.reference(case), self.reference(case, np.float32)
        assert outputs.map.dtype == outputs.score.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(outputs.map), np.isnan(exact.map))
        np.testing.assert_array_equal(np.isnan(outputs.score), np.isnan(exact.score))
        distances, rounding = self._distances_and_rounding(case)
        slack = 4 * rounding.max(initial=0)
        for ours, theirs, true in [
            (outputs.map, plain.map, exact.map),
            (outputs.score, plain.score, exact.score),
        ]:
            error = np.nanmax(np.abs(ours - true), initial=0)
            allowed = 2 * np.nanmax(np.abs(theirs - true), initial=0) + slack
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
        self._check_nearest(outputs.nearest, distances, case)

    @staticmethod
    def _check_nearest(nearest: NDArray[np.int64], distances: NDArray[np.float64], case: Case) -> None:
        """The named prototype is of its class and as near as any, up to the rounding of a distance."""
        n_normal, count = case.parameters.n_normal, len(case.prototypes)
        z, p = case.z.astype(np.float64), case.prototypes.astype(np.float64)
        scale = (z * z).sum(1).max(initial=0) + (p * p).sum(1).max()
        for plane, first, end in [(0, 0, n_normal), (1, n_normal, count)]:
            chosen = nearest[:, plane]
            assert ((first <= chosen) & (chosen < end)).all()
            squared = np.take_along_axis(distances, chosen[..., None], -1)[..., 0] ** 2
            best = distances[..., first:end].min(-1) ** 2
            assert (squared - best <= 1e-5 * scale).all()

    @staticmethod
    def _distances_and_rounding(case: Case) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Distances [N, H, W, K], and what one rounding of each float32 intermediate does to the evidence [N, H, W]."""
        z, p = np.moveaxis(case.z.astype(np.float64), 1, -1), case.prototypes.astype(np.float64)
        squares = (z * z).sum(-1, keepdims=True) + (p * p).sum(-1)
        distances = np.sqrt(np.maximum(0, squares - 2 * z @ p.T))
        eps = float(np.finfo(np.float32).eps)
        # The error of a distance: that of its square, eps * squares, divided by 2 d; sqrt of it where d vanishes.
        of_distance = (eps * squares / np.maximum(distances, np.sqrt(eps * squares) + 1e-30)).max(-1)
        parameters = case.parameters
        scales = abs(parameters.normal_scale) + abs(parameters.anomaly_scale)
        rest = parameters.softness * np.log(len(p) + 1) + distances.max(-1)
        along = np.abs(z * case.direction).sum(-1) + abs(parameters.bias) + abs(parameters.offset)
        return distances, scales * (of_distance + eps * rest) + eps * along


@pytest.fixture(scope="session")
def precision(reference: Callable[..., Outputs]) -> Precision:
    return Precision(reference)


@pytest.fixture(scope="session")
def check_broken_cell() -> Callable[[Callable[[Case], Outputs], float], None]:
    """Checks that a cell with such a value never looks normal, and that nothing else changes, not even in a bit."""

    def check(run: Callable[[Case], Outputs], value: float) -> None:
        case = _make_case(images=3)
        clean = run(case)
        z = case.z.copy()
        z[1, 20, 2, 3] = value
        outputs = run(case.but(z=z))
        assert np.isnan(outputs.score[1])
        assert np.isnan(outputs.map[1, 2, 3])
        assert outputs.nearest[1, :, 2, 3].tolist() == [0, case.parameters.n_normal]
        elsewhere = np.ones(z[:, 0].shape, bool)
        elsewhere[1, 2, 3] = False
        np.testing.assert_array_equal(outputs.map[elsewhere], clean.map[elsewhere])
        np.testing.assert_array_equal(outputs.score[[0, 2]], clean.score[[0, 2]])

    return check
