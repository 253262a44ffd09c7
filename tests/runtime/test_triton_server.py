"""NVIDIA's own server with an exported repository: it reads config.pbtxt, warms up, batches and speaks to our client.

Its ONNX Runtime backend is in NVIDIA's containers alone, so its Python backend executes the graph; the line that names
the platform is the only one of config.pbtxt that is changed for that.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.bundle import open_bundle
from meliad_edge.errors import EngineError
from meliad_edge.parity import check_golden
from meliad_edge.runtime.load import load_triton_predictor

pytestmark = pytest.mark.workshop

ROOT = Path(__file__).parents[2]
START_S = 60.0

Invoke = Callable[..., Any]


@dataclass(frozen=True)
class Triton:
    """A server that runs, with the model of a bundle."""

    bundle: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"grpc://localhost:{self.port}"

    @property
    def client(self) -> Any:
        from tritonclient.grpc import InferenceServerClient

        return InferenceServerClient(f"localhost:{self.port}")


@pytest.fixture(scope="module")
def distribution() -> Path:
    """The folder with the server."""
    pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed", exc_type=ImportError)
    folder = ROOT / ".cache" / "triton"
    script = ROOT / "scripts" / "fetch_triton_for_tests.sh"
    done = subprocess.run([script, folder, sys.executable], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not done.stdout.endswith(f" in {folder}\n"):
        pytest.skip(done.stdout.strip())
    return folder


@pytest.fixture(scope="module")
def triton(
    distribution: Path, small_bundle: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("triton")
    assert invoke("export", small_bundle, "--format", "triton", "--out", folder / "models").code == 0
    use_python_backend(folder / "models" / "metal")
    server = distribution / "pytriton" / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    version = "{}.{}".format(*sys.version_info)
    stub = Path(shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend))
    libraries = f"{distribution / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    environment = os.environ | {"LD_LIBRARY_PATH": libraries, "PATHS_OF_THE_TEST": os.pathsep.join(sys.path)}
    linked = subprocess.run(["ldd", stub], capture_output=True, text=True, env=environment).stdout
    if missing := [line.split()[0] for line in linked.splitlines() if "not found" in line]:
        pytest.skip(f"Triton's Python backend needs {', '.join(missing)}, which is not here")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [server / "bin" / "tritonserver", f"--model-repository={folder / 'models'}"]
    command += [f"--backend-directory={backend.parent}", "--model-control-mode=explicit", "--load-model=metal"]
    command += ["--grpc-address=127.0.0.1", f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_until_started(process, folder / "log")
        yield Triton(small_bundle, port, process)
    finally:
        process.terminate()
        process.wait(START_S)


def use_python_backend(model: Path) -> None:
    config = model / "config.pbtxt"
    text = config.read_text(encoding="utf-8")
    platform = 'platform: "onnxruntime_onnx"'
    assert text.count(platform) == 1
    config.write_text(text.replace(platform, 'backend: "python"'), encoding="utf-8")
    shutil.copy(Path(__file__).parent / "triton_python_model.py", model / "1" / "model.py")


def wait_until_started(process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while b"Started GRPCInferenceService" not in log.read_bytes():
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < end, log.read_text(errors="replace")[-4000:]
        time.sleep(0.1)


def test_the_server_has_read_what_was_exported(triton: Triton) -> None:
    config = triton.client.get_model_config("metal").config
    assert list(config.version_policy.specific.versions) == [1]
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching")
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, config.instance_group[0].KIND_CPU)]
    assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, 8]


def test_it_warms_up_before_it_is_ready(triton: Triton) -> None:
    (statistics,) = triton.client.get_inference_statistics("metal").model_stats
    # Nobody has asked for anything yet.
    assert {batch.batch_size for batch in statistics.batch_stats} >= {1, 8}


@pytest.mark.parametrize("kind", ["good", "scratch", "stain"])
def test_decisions_are_those_of_this_machine(kind: str, triton: Triton, texture_set: Path, invoke: Invoke) -> None:
    command = ("predict", triton.bundle, texture_set / "test" / kind, "--json")
    local, served = invoke(*command), invoke(*command, "--triton", triton.url)
    assert (local.code, served.code) == (0, 0), served.err
    unit = open_bundle(triton.bundle).calibration.spread
    assert len(served.json["predictions"]) == 8
    for ours, theirs in zip(local.json["predictions"], served.json["predictions"], strict=True):
        assert theirs["decision"] == ours["decision"]
        assert theirs["score"] == pytest.approx(ours["score"], abs=0.01 * unit)
        assert len(theirs["regions"]) == len(ours["regions"])


def test_golden_frames_decide_as_where_the_bundle_was_made(triton: Triton) -> None:
    bundle = open_bundle(triton.bundle)
    assert check_golden(bundle, load_triton_predictor(triton.bundle, triton.url).engine, "fp32").passed


def test_more_frames_than_it_takes_are_split(triton: Triton) -> None:
    engine = load_triton_predictor(triton.bundle, triton.url).engine
    frames = np.random.default_rng(0).integers(0, 256, (19, *engine.input_size_hw, 3), np.uint8)
    before = counts(triton)
    raw = engine.infer(frames)
    after = counts(triton)
    assert {size: after[size] - before.get(size, 0) for size in after if after[size] != before.get(size, 0)} == {
        8: 2,
        3: 1,
    }
    one_by_one = np.concatenate([engine.infer(frame[np.newaxis]).score for frame in frames])
    np.testing.assert_allclose(raw.score, one_by_one, rtol=1e-4, atol=1e-4)


def counts(triton: Triton) -> dict[int, int]:
    """Executions by size of the batch."""
    (statistics,) = triton.client.get_inference_statistics("metal").model_stats
    return {batch.batch_size: batch.compute_infer.count for batch in statistics.batch_stats}


def test_a_model_that_is_not_there(triton: Triton) -> None:
    with pytest.raises(EngineError, match=r"model other is not ready; see the log of the server, and the names"):
        load_triton_predictor(triton.bundle, f"{triton.url}/other")


def test_a_model_that_is_taken_out_of_service(triton: Triton) -> None:
    engine = load_triton_predictor(triton.bundle, triton.url).engine
    frame = open_bundle(triton.bundle).golden[0].frame[np.newaxis]
    triton.client.unload_model("metal")
    try:
        with pytest.raises(
            EngineError, match=r"model metal cannot be used \(\w+: .*'metal'.*\); see the log"
        ) as caught:
            engine.infer(frame)
        assert "\n" not in str(caught.value)
    finally:
        triton.client.load_model("metal")
    assert len(engine.infer(frame).score) == 1


def test_a_server_that_dies(triton: Triton) -> None:
    engine = load_triton_predictor(triton.bundle, triton.url).engine
    triton.process.kill()
    triton.process.wait()
    with pytest.raises(EngineError, match=r"model metal cannot be used \(UNAVAILABLE: .*\); see the log"):
        engine.infer(open_bundle(triton.bundle).golden[0].frame[np.newaxis])
