"""The TensorRT plugin: in a host that plays TensorRT's part, and in what of TensorRT needs no GPU. Nothing runs on one.

The host executes the plugin's kernels on the CPU, so its values can be checked. The real build is loaded, parsed
and built into an engine, and then stops: executing it takes a device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.precision import PRECISIONS, Precision

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def include_flags(cuda_include: Path) -> list[str]:
    """Where TensorRT's headers are, and CUDA's, which they include."""
    system = Path("/usr/include")
    folders = [
        Path(os.environ.get("TENSORRT_INCLUDE_DIR", "/nonexistent")),
        system,
        system / f"{platform.machine()}-linux-gnu",
        Path("/usr/local/include"),
        ROOT / ".cache" / "tensorrt-headers",
    ]
    tensorrt = next((folder for folder in folders if (folder / "NvInferRuntime.h").is_file()), None)
    if tensorrt is None:
        pytest.skip("no TensorRT headers; scripts/fetch_tensorrt_headers.sh gets them")
    return ["-isystem", str(tensorrt), "-isystem", str(cuda_include)]


@dataclass(frozen=True)
class Host:
    """tensorrt_host.cpp with one build of the plugin."""

    program: Path
    library: Path

    def __call__(
        self, *arguments: object, stdin: bytes = b"", tensorrt: int = 10
    ) -> subprocess.CompletedProcess[bytes]:
        command, *rest = map(str, arguments)
        return subprocess.run(
            [self.program, self.library, command, *rest],
            input=stdin,
            capture_output=True,
            env=os.environ | {"TENSORRT_HOST_LAYOUT": str(tensorrt)},
        )

    def infer(self, z: str, prototypes: str, direction: str, fields: list[str]) -> list[str]:
        done = self("infer", z, prototypes, direction, *fields)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().splitlines()

    def score(self, case: Any, precision: str = "float") -> subprocess.CompletedProcess[bytes]:
        element = np.float16 if precision == "half" else np.float32
        arrays = [case.z.astype(element), case.prototypes.astype(element), case.direction]
        shapes = ["x".join(map(str, array.shape)) for array in arrays]
        values = b"".join(array.tobytes() for array in arrays)
        return self("score", precision, *shapes, *fields_of(case), stdin=values)


def fields_of(case: Any, **changes: str | None) -> list[str]:
    """Arguments for the host: the parameters of a case, with some replaced or, as None, left out."""
    fields = {
        name: f"{'int64' if isinstance(value, int) else 'float32'}:{value}"
        for name, value in asdict(case.parameters).items()
    }
    return [f"{name}={value}" for name, value in (fields | changes).items() if value is not None]


def outputs_of(done: subprocess.CompletedProcess[bytes], case: Any, outputs_type: Any) -> Any:
    assert done.returncode == 0, done.stderr.decode()
    images, _, height, width = case.z.shape
    cells = images * height * width
    assert len(done.stdout) == 4 * images + 4 * cells + 8 * 2 * cells
    score, evidence, nearest = (
        np.frombuffer(done.stdout, np.float32, images),
        np.frombuffer(done.stdout, np.float32, cells, 4 * images),
        np.frombuffer(done.stdout[4 * images + 4 * cells :], np.int64),
    )
    shape = (images, height, width)
    return outputs_type(score, evidence.reshape(shape), nearest.reshape(images, 2, height, width))


@pytest.fixture(scope="session")
def host_program(cxx: str, include_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("tensorrt-host") / "tensorrt_host"
    subprocess.run([cxx, *FLAGS, *include_flags, HERE / "tensorrt_host.cpp", "-ldl", "-o", program], check=True)
    return program


@pytest.fixture(scope="session")
def host(cxx: str, include_flags: list[str], host_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The host with the plugin as plain C++: its CUDA kernels are executed on the CPU, all of it under sanitizers."""
    library = tmp_path_factory.mktemp("tensorrt-plugin") / "libmeliad_trt.so"
    sources = sorted((ROOT / "kernels" / "tensorrt").glob("*.cpp"))
    cuda = ["-DMELIAD_CUDA_ON_CPU", "-Wno-unknown-pragmas", "-x", "c++", ROOT / "kernels" / "cuda" / "patch_entropy.cu"]
    command = [cxx, *FLAGS, *include_flags, "-shared", "-fPIC", "-fvisibility=hidden", *sources, *cuda, "-o", library]
    subprocess.run(list(map(str, command)), check=True)
    return Host(host_program, library)


FLAGS = ["-std=c++17", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Loggers are called through a layout that is looked up while running, not through their declared type.
FLAGS += ["-fno-sanitize=vptr"]


def test_describes_itself_as_the_exported_node_needs_it(host: Host, make_case: Any) -> None:
    done = host("describe", *fields_of(make_case()))
    assert done.returncode == 0, done.stderr.decode()
    plugin, fields, *lines, small, large = done.stdout.decode().splitlines()
    assert plugin == "plugin 'PatchEntropyScore' '1' ''"
    assert fields.split()[1:] == list(asdict(make_case().parameters))
    assert lines == [
        "outputs float float int64",
        "formats float float float float float int64",
        "formats half half float float float int64",
    ]
    assert int(large.split()[1]) > int(small.split()[1]) > 0


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        ("nx33xhxw", ["n", "nxhxw", "nx2xhxw"]),
        ("1x33xhxw", ["1", "1xhxw", "1x2xhxw"]),
        ("nx33x5x7", ["n", "nx5x7", "nx2x5x7"]),
        ("nxdxhxw", ["n", "nxhxw", "nx2xhxw"]),
        ("0x33x5x7", ["0", "0x5x7", "0x2x5x7"]),
    ],
)
def test_infers_shapes(z: str, expected: list[str], host: Host, make_case: Any) -> None:
    fields = fields_of(make_case())
    assert host.infer(z, "40x33", "33", fields) == expected
    assert host.infer(z, "kxd", "d", fields) == expected


SHAPES = {
    "one cell": {"images": 1, "height": 1, "width": 1, "top_cells": 1},
    "rows of odd length": {},
    "rows of 16 bytes": {"depth": 64, "height": 8, "width": 8, "prototypes": 70, "n_normal": 40},
    "many": {"images": 3, "depth": 65, "height": 16, "width": 16, "prototypes": 130, "n_normal": 97},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("element", ["float", "half"])
def test_agrees_with_the_definition(
    element: str, shape: dict[str, int], host: Host, make_case: Any, reference: Any, precision: Any
) -> None:
    case = make_case(**shape)
    if element == "half":  # the definition sees what the plugin sees
        case = case.but(
            z=case.z.astype(np.float16).astype(np.float32),
            prototypes=case.prototypes.astype(np.float16).astype(np.float32),
        )
    precision.check(outputs_of(host.score(case, element), case, type(reference(case))), case)


def test_an_empty_batch_has_empty_outputs(host: Host, make_case: Any) -> None:
    done = host.score(make_case(images=0))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("tensorrt", [10, 11])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_normal": None}, "field n_normal is missing; export the model again"),
        ({"offset": None}, "field offset is missing; export the model again"),
        ({"kappa": "nothing:"}, "field kappa must hold one value"),
        ({"top_cells": "float32:4"}, "field top_cells must be an integer"),
        ({"softness": "int64:1"}, "field softness must be a 32-bit float"),
        ({"softness": "float64:1"}, "field softness must be a 32-bit float"),
        ({"n_normal": "int64:0"}, "n_normal is 0; it must be at least 1"),
        ({"n_normal": "int32:-3"}, "n_normal is -3; it must be at least 1"),
        ({"top_cells": "int64:0"}, "top_cells is 0; it must be at least 1"),
        ({"softness": "float32:0"}, "softness is 0.000000; it must be positive and finite"),
        ({"softness": "float32:nan"}, "softness is nan; it must be positive and finite"),
        ({"kappa": "float32:1"}, "kappa is 1.000000; it must lie in [0, 1)"),
    ],
)
def test_impossible_fields_are_refused_in_one_line(
    change: dict[str, str | None], message: str, tensorrt: int, host: Host, make_case: Any
) -> None:
    done = host("describe", *fields_of(make_case(), **change), tensorrt=tensorrt)
    assert done.returncode == 3
    assert done.stderr.decode() == f"TensorRT error: PatchEntropyScore: {message}\n"


def test_a_field_that_is_there_twice_is_refused(host: Host, make_case: Any) -> None:
    done = host("describe", *fields_of(make_case()), "bias=float32:1")
    assert done.returncode == 3
    assert done.stderr.decode() == "TensorRT error: PatchEntropyScore: field bias is there twice\n"


def test_integers_of_both_widths_and_fields_of_others_are_taken(host: Host, make_case: Any) -> None:
    fields = fields_of(make_case(), n_normal="int32:29", plugin_namespace="int32:0")
    assert host("describe", *fields).returncode == 0


@pytest.mark.parametrize(
    ("z", "prototypes", "direction", "message"),
    [
        ("nx33x5x7", "29x33", "33", "n_normal is 29 of 29 prototypes; both classes need at least one"),
        ("nx33x5x7", "40x33x1", "33", "prototypes has shape [40, 33, 1], expected [K, D]"),
        ("nx32x5x7", "40x33", "33", "z has shape [-1, 32, 5, 7], expected [N, 33, H, W]"),
        ("nx33x5", "40x33", "33", "z has shape [-1, 33, 5], expected [N, 33, H, W]"),
        ("nx33x5x7", "40x33", "32", "direction has shape [32], expected [33]"),
        ("nx33x1x3", "40x33", "33", "z has shape [-1, 33, 1, 3], expected at least top_cells = 4 cells"),
    ],
)
def test_shapes_that_cannot_fit_are_refused_when_the_engine_is_built(
    z: str, prototypes: str, direction: str, message: str, host: Host, make_case: Any
) -> None:
    done = host("infer", z, prototypes, direction, *fields_of(make_case()))
    assert done.returncode == 4
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"TensorRT error: PatchEntropyScore: {message}")


def test_shapes_that_do_not_fit_are_refused_when_run(host: Host, make_case: Any) -> None:
    case = make_case()
    for broken, message in [
        (case.but(top_cells=36), "z has shape [2, 33, 5, 7], expected at least top_cells = 36 cells"),
        (case.but(n_normal=40), "n_normal is 40 of 40 prototypes"),
        (case.but(prototypes=case.prototypes[:, :32]), "z has shape [2, 33, 5, 7], expected [N, 32, H, W]"),
        (case.but(direction=case.direction[:32]), "direction has shape [32], expected [33]"),
    ]:
        done = host.score(broken)
        assert (done.returncode, done.stdout) == (4, b"")
        assert message in done.stderr.decode()


def test_more_images_than_a_grid_has_room_for_are_an_error(host: Host, make_case: Any) -> None:
    done = host.score(make_case(images=65536, depth=1, height=1, width=1, top_cells=1))
    assert (done.returncode, done.stdout) == (5, b"")
    assert "CUDA error 1 for z of shape [65536, 1, 1, 1]" in done.stderr.decode()


@pytest.fixture(scope="session")
def real_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin as it is installed, compiled for one architecture to save time, without ONNX Runtime's headers."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on this machine")
    folder = tmp_path_factory.mktemp("tensorrt-build")
    options = ["-DONNXRUNTIME_INCLUDE_DIR=none", "-DCMAKE_CUDA_ARCHITECTURES=87-real"]
    options += ["-DMELIAD_WARNINGS_AS_ERRORS=ON"]
    for command in (["-S", ROOT, "-B", folder / "build", *options], ["--build", folder / "build"]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        if "libmeliad_trt.so: skipped" in done.stdout:
            pytest.skip("no libmeliad_trt.so: building it needs nvcc and TensorRT's headers")
    subprocess.run(["cmake", "--install", folder / "build", "--prefix", folder / "installed"], check=True)
    (library,) = (folder / "installed").glob("**/libmeliad_trt.so")
    assert library.relative_to(folder / "installed") == Path("meliad_edge/_kernels/libmeliad_trt.so")
    return library


def test_the_real_build_exports_two_functions_and_needs_no_driver(real_library: Path) -> None:
    def symbols(which: str) -> list[str]:
        done = subprocess.run(["nm", "-D", which, real_library], capture_output=True, text=True, check=True)
        return [line.split()[-1] for line in done.stdout.splitlines()]

    assert symbols("--defined-only") == ["getCreators", "setLoggerFinder"]
    undefined = symbols("--undefined-only")
    assert undefined
    assert not [name for name in undefined if name.startswith(("cu", "__cuda", "nv")) or "nvinfer" in name]
    linked = subprocess.run(["ldd", real_library], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("libcuda", "libcudart", "libnvinfer", "not found") if name in linked]


def test_the_real_build_says_that_there_is_no_gpu(real_library: Path, host_program: Path, make_case: Any) -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("this machine may have a GPU, and the host hands out memory of the CPU")
    done = Host(host_program, real_library).score(make_case())
    assert (done.returncode, done.stdout) == (5, b"")
    assert "PatchEntropyScore: CUDA error 35" in done.stderr.decode()  # no driver


def real_tensorrt(package: str, *arguments: object, folder: Path) -> dict[str, Any]:
    """What tensorrt_process.py says, or a skip without the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed; install the extra tensorrt-test")
    # The parser opens its library under a name that the wheel leaves out.
    versioned = Path(spec.origin).parents[1] / f"{package}_libs" / f"lib{package}.so.1"
    if versioned.is_file():
        (folder / f"lib{package}.so").symlink_to(versioned)
    done = subprocess.run(
        [sys.executable, HERE / "tensorrt_process.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout}{done.stderr}"
    return dict(json.loads(done.stdout))


def test_tensorrts_registry_loads_the_real_build(real_library: Path, make_case: Any, tmp_path: Path) -> None:
    said = real_tensorrt("tensorrt_lean", "registry", real_library, folder=tmp_path)
    assert said["fields"] == list(asdict(make_case().parameters))
    assert said["created"]
    assert not said["created_with_kappa_2"]


def exported_node_model(case: Any, element: type[np.floating[Any]], *, with_body: bool = False) -> bytes:
    """A model of one node, made as every export makes it; sizes of the batch and the grid are free."""
    onnx = pytest.importorskip("onnx", reason="onnx makes the one-node model; install the extra export")
    pytest.importorskip("torch", reason="the exporter needs torch; install the extra train")
    from meliad_edge.export.scoring_function import scoring_function, scoring_node, scoring_opset

    names = ("embeddings", "prototypes", "direction"), ("score_raw", "map_raw", "nearest")
    helper, types = onnx.helper, onnx.TensorProto
    kind = types.FLOAT16 if element is np.float16 else types.FLOAT
    model = helper.make_model(
        helper.make_graph(
            [scoring_node(*names, case.parameters)],
            "one_node",
            [helper.make_tensor_value_info("embeddings", kind, ["n", case.prototypes.shape[1], "h", "w"])],
            [
                helper.make_tensor_value_info(name, type_, None)
                for name, type_ in zip(names[1], (types.FLOAT, types.FLOAT, types.INT64), strict=True)
            ],
            initializer=[
                onnx.numpy_helper.from_array(case.prototypes.astype(element), "prototypes"),
                onnx.numpy_helper.from_array(case.direction, "direction"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 18), scoring_opset()],
        ir_version=10,
        functions=[scoring_function()] if with_body else [],
    )
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("element", [np.float32, np.float16])
def test_tensorrt_builds_an_engine_from_the_exported_node(
    element: type[np.floating[Any]], real_library: Path, make_case: Any, tmp_path: Path
) -> None:
    model = tmp_path / "one_node.onnx"
    model.write_bytes(exported_node_model(make_case(), element))
    said = real_tensorrt("tensorrt_rtx", "engine", real_library, model, folder=tmp_path)
    assert said["parsed"], said["errors"]
    assert said["plugins"] == ["PatchEntropyScore"]
    assert said["outputs"] == {
        "score_raw": ["FLOAT", [-1]],
        "map_raw": ["FLOAT", [-1, -1, -1]],
        "nearest": ["INT64", [-1, 2, -1, -1]],
    }
    assert said["engine_bytes"] > 0
    assert said["plugin_is_in_engine"]


def test_the_function_body_takes_the_node_from_the_plugin(real_library: Path, make_case: Any, tmp_path: Path) -> None:
    """Why the body is removed from a model before TensorRT sees it."""
    model = tmp_path / "one_node.onnx"
    model.write_bytes(exported_node_model(make_case(), np.float32, with_body=True))
    said = real_tensorrt("tensorrt_rtx", "engine", real_library, model, folder=tmp_path)
    assert said["parsed"], said["errors"]
    assert said["plugins"] == []
    assert said["layers"] > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kappa": 1.0}, "PatchEntropyScore: kappa is 1.000000; it must lie in [0, 1)"),
        ({"n_normal": 40}, "PatchEntropyScore: n_normal is 40 of 40 prototypes; both classes need at least one"),
    ],
)
def test_tensorrts_log_says_why_a_model_is_refused(
    change: dict[str, float], message: str, real_library: Path, make_case: Any, tmp_path: Path
) -> None:
    model = tmp_path / "one_node.onnx"
    model.write_bytes(exported_node_model(make_case().but(**change), np.float32))
    said = real_tensorrt("tensorrt_rtx", "engine", real_library, model, folder=tmp_path)
    assert not said["parsed"]
    assert message in said["errors"]


@pytest.mark.workshop
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_builds_an_engine_from_an_exported_model(
    precision: Precision, real_library: Path, precise_bundle: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed; install the extra tensorrt-test")
    from meliad_edge.bundle import open_bundle
    from meliad_edge.export.tensorrt_graph import to_tensorrt

    model = tmp_path / "exported.onnx"
    model.write_bytes(to_tensorrt(open_bundle(precise_bundle).models[precision]))
    said = real_tensorrt("tensorrt_rtx", "engine", real_library, model, folder=tmp_path)
    assert said["parsed"], said["errors"]
    assert said["plugins"] == ["PatchEntropyScore"]
    assert set(said["outputs"]) == {"score_raw", "map_raw", "nearest"}
    for link in tmp_path.glob("*.so"):
        link.unlink()
    built = real_tensorrt("tensorrt_rtx", "build", real_library, model, tmp_path / "rtx.timing", folder=tmp_path)
    assert built["engine_bytes"] > 0
    assert built["plugin_is_in_engine"]


def test_our_build_passes_on_what_tensorrt_says(real_library: Path, make_case: Any, tmp_path: Path) -> None:
    model = tmp_path / "one_node.onnx"
    model.write_bytes(exported_node_model(make_case().but(kappa=1.0), np.float32))
    said = real_tensorrt("tensorrt_rtx", "build", real_library, model, tmp_path / "rtx.timing", folder=tmp_path)
    version, _, reason = said["error"].partition(" cannot parse the graph ")
    assert version.startswith("EngineError: TensorRT ")
    assert reason == "(PatchEntropyScore: kappa is 1.000000; it must lie in [0, 1)); see: meliad-edge doctor"


@pytest.fixture
def fetch_script(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    return Path(shutil.copy(ROOT / "scripts" / "fetch_tensorrt_headers.sh", tmp_path / "scripts"))


def test_headers_that_cannot_be_fetched_do_not_stop_the_build(fetch_script: Path) -> None:
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = subprocess.run(
        [fetch_script, sys.executable], capture_output=True, text=True, check=True, env=os.environ | offline
    )
    (line,) = done.stdout.splitlines()
    if "this machine has them" in line:
        pytest.skip("this machine has headers of its own")
    assert "cannot be fetched (ERROR: No matching distribution found for kernel-lens==2.0.1)" in line
    assert "the TensorRT plugin is skipped" in line
    assert not (fetch_script.parents[1] / ".cache").exists()


def test_headers_of_the_machine_are_not_fetched(fetch_script: Path, tmp_path: Path) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    environment = os.environ | {"TENSORRT_INCLUDE_DIR": str(tmp_path)}
    done = subprocess.run([fetch_script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "tensorrt headers: this machine has them\n"
