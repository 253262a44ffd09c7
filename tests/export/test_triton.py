"""The model repository, read with Triton's own schema of its configuration."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.errors import UsageError
from meliad_edge.export.tensorrt_graph import to_tensorrt
from meliad_edge.export.triton_repository import MAX_BATCH, ServedModel, write_onnx_model, write_tensorrt_model
from meliad_edge.parity import check_golden
from meliad_edge.runtime.kernel_library import find_kernel_library
from meliad_edge.runtime.load import load_triton_predictor
from meliad_edge.runtime.triton_model import DIGEST

pytestmark = pytest.mark.workshop

Invoke = Callable[..., Any]
ReadConfig = Callable[[Path], Any]


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> Bundle:
    return open_bundle(small_bundle)


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> ServedModel:
    manifest = bundle.manifest
    return ServedModel(manifest.name, bundle.models["fp32"], manifest.input_hw, manifest.grid_hw)


@pytest.fixture(scope="module")
def read_config() -> ReadConfig:
    """Parse a configuration as Triton does: what its schema does not know is an error."""
    pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed", exc_type=ImportError)
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    def read(folder: Path) -> Any:
        return text_format.Parse((folder / "config.pbtxt").read_bytes(), model_config_pb2.ModelConfig())

    return read


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_graph_is_that_of_the_bundle_byte_for_byte(served: ServedModel, bundle: Bundle, tmp_path: Path) -> None:
    folder = write_onnx_model(tmp_path / "models", served, 3)
    assert folder == tmp_path / "models" / "metal"
    assert files_of(tmp_path) == ["models/metal/3/model.onnx", "models/metal/config.pbtxt"]
    assert hashlib.sha256((folder / "3/model.onnx").read_bytes()).hexdigest() == bundle.model_sha256("fp32")


@pytest.mark.parametrize("platform", ["onnxruntime_onnx", "tensorrt_plan"])
def test_the_configuration_says_what_the_graph_is(
    platform: str, served: ServedModel, read_config: ReadConfig, tmp_path: Path
) -> None:
    write = write_onnx_model if platform == "onnxruntime_onnx" else write_tensorrt_model
    config = read_config(write(tmp_path, served, 3))
    assert (config.name, config.platform, config.max_batch_size) == ("metal", platform, MAX_BATCH)
    assert list(config.version_policy.specific.versions) == [3]
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, group.KIND_AUTO if platform == "onnxruntime_onnx" else group.KIND_GPU)
    assert {key: value.string_value for key, value in config.parameters.items()} == {DIGEST: served.sha256}
    assert not config.HasField("model_operations")
    assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, MAX_BATCH]
    for warm_up in config.model_warmup:
        assert list(warm_up.inputs) == ["frames"]
        assert warm_up.inputs["frames"].random_data
        assert list(warm_up.inputs["frames"].dims) == list(config.input[0].dims)
    # Against the graph itself, whose first dimension Triton adds.
    graph = onnx.load_model_from_string(served.graph).graph
    types = {config.input[0].data_type: onnx.TensorProto.UINT8}
    types |= {config.output[0].data_type: onnx.TensorProto.FLOAT, config.output[2].data_type: onnx.TensorProto.INT64}
    described = [
        (
            tensor.name,
            types[tensor.data_type],
            list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims),
        )
        for tensor in (*config.input, *config.output)
    ]
    assert described == [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [dimension.dim_value for dimension in value.type.tensor_type.shape.dim[1:]],
        )
        for value in (*graph.input, *graph.output)
    ]


def test_the_library_of_the_server_is_named(served: ServedModel, read_config: ReadConfig, tmp_path: Path) -> None:
    library = '/opt/"ours"/lib\\ü.so'
    config = read_config(write_onnx_model(tmp_path, served, 1, library))
    assert list(config.model_operations.op_library_filename) == [library]


@pytest.fixture
def start(triton_stand_in: ModuleType) -> Iterator[Callable[[Path], Any]]:
    """Serve a repository until the test ends."""
    servers = []

    def run(repository: Path) -> Any:
        servers.append(triton_stand_in.Server(repository))
        return servers[-1]

    yield run
    for server in servers:
        server.stop()


def test_with_the_library_the_server_scores_with_the_kernel(
    small_bundle: Path, bundle: Bundle, served: ServedModel, start: Callable[[Path], Any], tmp_path: Path
) -> None:
    library = find_kernel_library()
    if library is None:
        pytest.skip("no libmeliad_ort.so: building it needs ONNX Runtime's headers")
    scores = []
    for name, path in (("bodies", None), ("kernel", str(library))):
        write_onnx_model(tmp_path / name, served, 1, path)
        server = start(tmp_path / name)
        engine = load_triton_predictor(small_bundle, f"grpc://localhost:{server.port}").engine
        assert check_golden(bundle, engine, "fp32").passed
        (model,) = server.models.values()
        scores.append(engine.infer(np.stack([frame.frame for frame in bundle.golden])).score)
        assert model.config.model_operations.op_library_filename == ([] if path is None else [path])
    np.testing.assert_allclose(scores[0], scores[1], atol=0.01 * bundle.calibration.spread)
    assert (scores[0] != scores[1]).any()  # other sums, in another order


def test_the_same_version_may_be_written_again_but_not_another_graph(served: ServedModel, tmp_path: Path) -> None:
    folder = write_onnx_model(tmp_path, served, 1)
    before = (folder / "config.pbtxt").read_bytes()
    assert write_onnx_model(tmp_path, served, 1) == folder
    assert (folder / "config.pbtxt").read_bytes() == before
    other = ServedModel(served.name, served.graph + b"\x00", served.input_hw, served.grid_hw)
    with pytest.raises(UsageError, match=r"1/model\.onnx: is another graph, .*; give a higher --model-version$"):
        write_onnx_model(tmp_path, other, 1)
    with pytest.raises(UsageError, match="is another graph"):
        write_tensorrt_model(tmp_path, served, 1)
    assert (folder / "config.pbtxt").read_bytes() == before


def test_the_next_version_is_served_alone_and_the_last_one_stays(
    served: ServedModel, read_config: ReadConfig, tmp_path: Path
) -> None:
    write_onnx_model(tmp_path, served, 1)
    folder = write_onnx_model(tmp_path, served, 2)
    assert list(read_config(folder).version_policy.specific.versions) == [2]
    assert files_of(folder) == ["1/model.onnx", "2/model.onnx", "config.pbtxt"]


def test_a_name_that_triton_cannot_spell(served: ServedModel, tmp_path: Path) -> None:
    nameless = ServedModel("部品", served.graph, served.input_hw, served.grid_hw)
    with pytest.raises(UsageError, match="^'部品': Triton's names have letters"):
        write_onnx_model(tmp_path, nameless, 1)
    assert files_of(tmp_path) == []


def test_a_run_and_its_bundle_give_the_same_graph(
    small_run: Path, small_bundle: Path, bundle: Bundle, invoke: Invoke, tmp_path: Path
) -> None:
    records = [
        invoke("export", source, "--format", "triton", "--out", tmp_path / source.suffix.strip("."), "--json").json
        for source in (small_run, small_bundle)
    ]
    for record, source in zip(records, ("run", "metal"), strict=True):
        assert Path(record["out"]).name == source
        assert record["model_sha256"] == {"fp32": bundle.model_sha256("fp32")}
        assert record["bytes"] == len(bundle.models["fp32"])
    assert {result["engine"] for result in records[0]["parity"]} >= {"onnxruntime-cpu"}
    assert records[1]["parity"] == []


def test_the_number_of_the_release_is_the_version(small_bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    from meliad_edge.bundle import release

    copy = tmp_path / "metal.meliad"
    copy.write_bytes(small_bundle.read_bytes())
    release(copy, version=7)
    for options, version in (((), 7), (("--model-version", 9), 9)):
        out = tmp_path / str(version)
        assert invoke("export", copy, "--format", "triton", "--out", out, *options).code == 0
        assert files_of(out) == [f"metal/{version}/model.onnx", "metal/config.pbtxt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "triton"), "--format triton needs --out REPO"),
        (("--format", "triton-tensorrt"), "--format triton-tensorrt needs --out REPO"),
        (("--format", "triton", "--out", "x", "--model-version", 0), "--model-version 0: Triton counts from 1"),
        (("--format", "triton", "--out", "x", "--sign", "key"), "--sign and --budget-ms are for bundles"),
        (("--format", "triton", "--out", "x", "--budget-ms", 9), "--sign and --budget-ms are for bundles"),
        (
            ("--format", "triton", "--out", "x", "--precision", "fp16", "--precision", "int8"),
            "--format triton writes one graph, 2 precisions are asked for",
        ),
        (("--op-library", "x.so"), "--op-library is for --format triton, not for bundle"),
        (
            ("--format", "triton-tensorrt", "--out", "x", "--op-library", "x.so"),
            "--op-library is for --format triton, not for triton-tensorrt",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: tuple[object, ...], message: str, small_bundle: Path, invoke: Invoke
) -> None:
    outcome = invoke("export", small_bundle, *options)
    assert outcome.code == 2
    assert outcome.error_line.startswith(message)


def test_a_precision_that_the_bundle_lacks(small_bundle: Path, invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "models"
    outcome = invoke("export", small_bundle, "--format", "triton", "--precision", "int8", "--out", out)
    assert outcome.code == 5
    assert outcome.error_line == "the bundle carries no int8 graph, only fp32; export it with --precision int8"
    assert not out.exists()


def test_what_tensorrt_gets_is_what_its_parser_takes(served: ServedModel, tmp_path: Path) -> None:
    folder = write_tensorrt_model(tmp_path, served, 1)
    assert files_of(folder) == ["1/build-plan.sh", "1/model.onnx", "config.pbtxt"]
    assert (folder / "1/model.onnx").read_bytes() == to_tensorrt(served.graph)


STAND_IN = """#!/bin/sh
for argument; do
    case $argument in
        --onnx=*) test -f "${argument#--onnx=}" || exit 3 ;;
        --saveEngine=*) echo plan > "${argument#--saveEngine=}" ;;
    esac
    echo "$argument"
done
exit "${STATUS:-0}"
"""


def build_plan(folder: Path, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script from elsewhere, with a trtexec that says what it is asked for and writes an engine."""
    tools = folder.parent / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "trtexec").write_text(STAND_IN)
    (tools / "trtexec").chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "STATUS": str(status)}
    command = ["sh", folder.relative_to(folder.parent) / "1/build-plan.sh", *arguments]
    return subprocess.run(list(map(str, command)), cwd=folder.parent, capture_output=True, text=True, env=environment)


def test_the_command_for_trtexec(served: ServedModel, tmp_path: Path) -> None:
    folder = write_tensorrt_model(tmp_path, served, 1)
    plugin = tmp_path / "libmeliad_trt.so"
    plugin.touch()
    done = build_plan(folder, plugin.name)
    assert done.returncode == 0, done.stderr
    height, width = served.input_hw
    shapes = [
        f"--{which}Shapes=frames:{size}x{height}x{width}x3" for which, size in (("min", 1), ("opt", 1), ("max", 8))
    ]
    assert done.stdout.splitlines() == [
        "--onnx=model.onnx",
        "--saveEngine=model.plan.partial",
        f"--dynamicPlugins={plugin}",
        f"--setPluginsToSerialize={plugin}",
        "--versionCompatible",
        *shapes,
        "--stronglyTyped",
        "--noTF32",
        "--memPoolSize=workspace:1024",
        "--skipInference",
    ]
    assert files_of(folder) == ["1/build-plan.sh", "1/model.onnx", "1/model.plan", "config.pbtxt"]


def test_no_plan_where_trtexec_fails_or_the_plugin_is_not_named(served: ServedModel, tmp_path: Path) -> None:
    folder = write_tensorrt_model(tmp_path, served, 1)
    failed = build_plan(folder, "plugin.so", status=1)
    assert failed.returncode == 1
    unnamed = build_plan(folder)
    assert unnamed.returncode != 0
    assert "path of libmeliad_trt.so" in unnamed.stderr
    assert not (folder / "1/model.plan").exists()
