"""Decisions by a Triton server, against a server of its protocol that can be told to fail."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.errors import EngineError, MissingExtraError, UsageError
from meliad_edge.parity import check_golden
from meliad_edge.precision import DEFAULT_LIMITS
from meliad_edge.runtime.load import load_predictor, load_triton_predictor
from meliad_edge.runtime.triton_model import DIGEST, TritonAddress, parse_triton_url, served_name

pytestmark = pytest.mark.workshop

Invoke = Callable[..., Any]


@pytest.fixture(scope="session")
def repository(precise_bundle: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of the bundle's graph in FP32. Read only."""
    folder = tmp_path_factory.mktemp("models")
    outcome = invoke("export", precise_bundle, "--format", "triton", "--out", folder)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def server(repository: Path, triton_stand_in: ModuleType) -> Iterator[Any]:
    running = triton_stand_in.Server(repository)
    yield running
    running.stop()


@pytest.fixture
def url(server: Any) -> str:
    return f"grpc://localhost:{server.port}"


@pytest.fixture
def bundle(precise_bundle: Path) -> Bundle:
    return open_bundle(precise_bundle)


def open_engine(bundle: Bundle, address: str, **options: Any) -> Any:
    pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed", exc_type=ImportError)
    from meliad_edge.runtime.triton_engine import TritonEngine

    manifest = bundle.manifest
    settings: dict[str, Any] = {
        "digests": [bundle.model_sha256("fp32")],
        "input_hw": manifest.input_hw,
        "grid_hw": manifest.grid_hw,
    }
    return TritonEngine(parse_triton_url(address), served_name(manifest.name), **(settings | options))


@pytest.mark.parametrize("kind", ["good", "scratch", "stain"])
def test_decisions_are_those_of_this_machine(
    kind: str, precise_bundle: Path, texture_set: Path, url: str, invoke: Invoke
) -> None:
    command = ("predict", precise_bundle, texture_set / "test" / kind, "--precision", "fp32", "--json")
    local, served = invoke(*command), invoke(*command, "--triton", url)
    assert (local.code, served.code) == (0, 0), served.err
    assert served.json["engine"] == "triton-onnxruntime_onnx"
    for name in ("model", "model_sha256", "precision", "errors"):
        assert served.json[name] == local.json[name]
    assert len(served.json["predictions"]) == 8
    # This machine scores with the kernel, the server without.
    unit, limits = open_bundle(precise_bundle).calibration.spread, DEFAULT_LIMITS["fp32"]
    for ours, theirs in zip(local.json["predictions"], served.json["predictions"], strict=True):
        assert theirs["decision"] == ours["decision"]
        assert theirs["score"] == pytest.approx(ours["score"], abs=limits.score * unit)
        np.testing.assert_allclose(theirs["map"], ours["map"], atol=limits.map * unit)
        for name in ("x", "y", "width", "height", "resembles", "differs_from"):
            assert [region[name] for region in theirs["regions"]] == [region[name] for region in ours["regions"]]


def test_golden_frames_decide_as_where_the_bundle_was_made(bundle: Bundle, url: str) -> None:
    result = check_golden(bundle, open_engine(bundle, url), "fp32")
    assert result.passed
    assert result.label_flips == ()


def test_more_frames_than_the_server_takes_are_split(bundle: Bundle, server: Any, url: str) -> None:
    engine = open_engine(bundle, url)
    frames = np.random.default_rng(0).integers(0, 256, (19, *engine.input_size_hw, 3), np.uint8)
    raw = engine.infer(frames)
    (model,) = server.models.values()
    assert model.batches == [8, 8, 3]
    height, width = bundle.manifest.grid_hw
    assert (raw.score.shape, raw.map.shape, raw.nearest.shape) == ((19,), (19, height, width), (19, 2, height, width))
    one_by_one = np.concatenate([engine.infer(frame[np.newaxis]).score for frame in frames])
    np.testing.assert_allclose(raw.score, one_by_one, rtol=1e-4, atol=1e-4)


def test_any_precision_of_the_bundle_may_be_served_unless_one_is_asked_for(
    precise_bundle: Path, invoke: Invoke, triton_stand_in: ModuleType, tmp_path: Path
) -> None:
    assert invoke("export", precise_bundle, "--format", "triton", "--precision", "int8", "--out", tmp_path).code == 0
    server = triton_stand_in.Server(tmp_path)
    try:
        address = f"grpc://localhost:{server.port}"
        assert load_triton_predictor(precise_bundle, address).precision == "int8"
        with pytest.raises(EngineError, match=r"serves the graph [0-9a-f]{12}, the bundle has [0-9a-f]{12}; export"):
            load_triton_predictor(precise_bundle, address, precision="fp32")
    finally:
        server.stop()


def test_another_model_of_that_name_is_refused(
    small_bundle: Path, precise_bundle: Path, url: str, invoke: Invoke, texture_set: Path
) -> None:
    assert open_bundle(small_bundle).manifest.name == open_bundle(precise_bundle).manifest.name
    outcome = invoke("predict", small_bundle, texture_set / "test/good", "--triton", url)
    assert outcome.code == 10
    assert outcome.error_line.startswith(f"{url}: model metal serves the graph ")
    assert outcome.out == ""


def forget_digest(config: Any) -> None:
    config.parameters[DIGEST].string_value = ""


def drop_output(config: Any) -> None:
    del config.output[1]


def change_type(config: Any) -> None:
    config.input[0].data_type = 11  # TYPE_FP32


def change_size(config: Any) -> None:
    config.input[0].dims[0] = 99


def change_map(config: Any) -> None:
    config.output[1].dims[1] = 99


def serve_all_versions(config: Any) -> None:
    config.version_policy.all.SetInParent()


def take_no_batches(config: Any) -> None:
    config.max_batch_size = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forget_digest, "serves the graph none that says what it was made of, the bundle has"),
        (drop_output, r"has nothing as map_raw, the bundle FP32 \[\d+, \d+\]; export"),
        (change_type, r"has FP32 \[128, 128, 3\] as frames, the bundle UINT8 \[128, 128, 3\]; export"),
        (change_size, r"has UINT8 \[99, 128, 3\] as frames, the bundle UINT8 \[128, 128, 3\]; export"),
        (change_map, r"has FP32 \[\d+, 99\] as map_raw, the bundle FP32 \[\d+, \d+\]; export"),
        (serve_all_versions, "serves any versions, and its digest is that of one; export"),
        (take_no_batches, "takes no batches; export"),
    ],
)
def test_a_model_with_another_interface_is_refused(
    change: Callable[[Any], None], message: str, bundle: Bundle, server: Any, url: str
) -> None:
    server.change_config = change
    with pytest.raises(EngineError, match=rf"^{url}: model metal {message}") as caught:
        open_engine(bundle, url)
    assert "\n" not in str(caught.value)


def spoil(index: int, value: float) -> Callable[[Any], None]:
    def change(answer: Any) -> None:
        content = np.frombuffer(answer.raw_output_contents[index], "<f4").copy()
        content[-1] = value
        answer.raw_output_contents[index] = content.tobytes()

    return change


def rename(answer: Any) -> None:
    answer.outputs[0].name = "score\n\x1b[2J"


def other_type(answer: Any) -> None:
    answer.outputs[0].datatype = "FP64"


def other_shape(answer: Any) -> None:
    answer.outputs[2].shape[1] = 3


def cut_short(answer: Any) -> None:
    answer.raw_output_contents[1] = answer.raw_output_contents[1][:-1]


def no_contents(answer: Any) -> None:
    del answer.raw_output_contents[:]


def same_output_twice(answer: Any) -> None:
    answer.outputs[1].name = "score_raw"


def another_version(answer: Any) -> None:
    answer.model_version = "2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(0, np.nan), "a score_raw that is not finite"),
        (spoil(1, np.nan), "a map_raw that is not finite"),
        (spoil(1, np.inf), "a map_raw that is not finite"),
        (rename, r"\['map_raw', 'nearest', 'score\\n\\x1b\[2J'\] in 3 parts instead of"),
        (other_type, r"FP64 \[1, 1\] as score_raw instead of FP32 \[1, 1\]"),
        (other_shape, r"INT64 \[1, 3, \d+, \d+\] as nearest instead of INT64 \[1, 2, "),
        (cut_short, r"\d+ bytes as map_raw instead of \d+"),
        (no_contents, r"\['map_raw', 'nearest', 'score_raw'\] in 0 parts instead of"),
        (same_output_twice, r"\['nearest', 'score_raw', 'score_raw'\] in 3 parts instead of"),
        (another_version, "version 2 instead of 1"),
    ],
)
def test_a_strange_answer_is_one_clear_error(
    change: Callable[[Any], None], message: str, bundle: Bundle, server: Any, url: str
) -> None:
    engine = open_engine(bundle, url)
    server.change_answer = change
    with pytest.raises(EngineError, match=rf"^{url}: model metal answered with {message}.*; see whether") as caught:
        engine.infer(bundle.golden[0].frame[np.newaxis])
    assert str(caught.value).isprintable()


def test_a_server_that_is_not_there(bundle: Bundle) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match=r"model metal cannot be used \(UNAVAILABLE: .*\); check the address"):
        open_engine(bundle, f"grpc://localhost:{port}")


def test_a_host_that_says_nothing(bundle: Bundle) -> None:
    with socket.create_server(("localhost", 0)) as silent:
        address = f"grpc://localhost:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match=r"cannot be used \(no answer within 0.3 s\); check the address"):
            open_engine(bundle, address, timeout_s=0.3)


def test_a_server_that_takes_too_long(bundle: Bundle, server: Any, url: str) -> None:
    engine = open_engine(bundle, url, timeout_s=1.0)
    server.delay_s = 1.5
    with pytest.raises(EngineError, match=r"model metal cannot be used \(no answer within 1 s\); see the log"):
        engine.infer(bundle.golden[0].frame[np.newaxis])


def test_a_model_that_is_not_ready(bundle: Bundle, server: Any, url: str) -> None:
    server.is_ready = False
    with pytest.raises(EngineError, match="model metal is not ready; see the log"):
        open_engine(bundle, url)


def test_a_model_that_is_not_there(bundle: Bundle, url: str) -> None:
    with pytest.raises(EngineError, match="model other is not ready; see the log of the server, and the names"):
        open_engine(bundle, f"{url}/other")


def test_a_server_that_goes_over_to_another_version_fails_the_next_call(bundle: Bundle, server: Any, url: str) -> None:
    engine = open_engine(bundle, url)
    (model,) = server.models.values()
    model.version = 2
    with pytest.raises(EngineError, match=r"cannot be used \(NOT_FOUND: .*version 1"):
        engine.infer(bundle.golden[0].frame[np.newaxis])


def test_a_server_that_stops_fails_the_next_call(bundle: Bundle, server: Any, url: str) -> None:
    engine = open_engine(bundle, url)
    server.stop()
    with pytest.raises(EngineError, match=r"cannot be used \((UNAVAILABLE|CANCELLED): .*\); see the log"):
        engine.infer(bundle.golden[0].frame[np.newaxis])


def test_through_tls(
    repository: Path, precise_bundle: Path, texture_set: Path, triton_stand_in: ModuleType, tmp_path: Path
) -> None:
    import grpc

    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    pair = (key.read_bytes(), certificate.read_bytes())
    server = triton_stand_in.Server(repository, grpc.ssl_server_credentials([pair]))
    try:
        address = f"grpcs://localhost:{server.port}"
        # In a process of its own: gRPC reads the certificates that it trusts once.
        code = "import sys; from meliad_edge.cli import main; main(sys.argv[1:])"
        picture = texture_set / "test/good/000.png"
        command = [sys.executable, "-c", code, "predict", precise_bundle, picture, "--json", "--triton", address]
        environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        for trusted, status in (({}, 10), ({"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate)}, 0)):
            done = subprocess.run(command, capture_output=True, text=True, env=environment | trusted, timeout=120)
            assert done.returncode == status, done.stderr
        assert '"decision"' in done.stdout
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("grpc://host", TritonAddress("host:8001", False)),
        ("grpc://10.0.0.7:9000/", TritonAddress("10.0.0.7:9000", False)),
        ("grpcs://[::1]:8001/line3", TritonAddress("[::1]:8001", True, "line3")),
    ],
)
def test_addresses(url: str, address: TritonAddress) -> None:
    assert parse_triton_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "host:8001", "http://host:8000", "grpc://", "grpc://host:99999", "grpc://host:x", "grpc://user:secret@host",
        "grpc://host/a/b", "grpc://host/..", "grpc://host?x=1", "grpc://[::1",
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_server(url: str, invoke: Invoke) -> None:
    outcome = invoke("predict", "none.meliad", "x.png", "--triton", url)
    assert outcome.code == 2
    assert outcome.error_line.endswith("give grpc://HOST:PORT or grpcs://HOST:PORT")
    assert "secret" not in outcome.err


@pytest.mark.parametrize(("name", "served"), [("line3", "line3"), ("Linie 3 (Süd)", "Linie-3-S-d"), ("../x", "x")])
def test_names_become_those_of_folders(name: str, served: str) -> None:
    assert served_name(name) == served


@pytest.mark.parametrize("option", [("--engine", "onnxruntime"), ("--threads", 1)])
def test_what_the_server_decides_cannot_be_asked_for(invoke: Invoke, option: tuple[object, ...]) -> None:
    outcome = invoke("predict", "none.meliad", "x.png", "--triton", "grpc://host", *option)
    assert outcome.code == 2
    assert outcome.error_line.startswith("--engine and --threads are for this machine")


@pytest.mark.parametrize("package", ["tritonclient", "grpc"])
def test_without_its_client_the_extra_is_named(
    package: str, precise_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(MissingExtraError, match=r"is not installed; run: pip install 'meliad-edge\[triton\]'"):
        load_triton_predictor(precise_bundle, "grpc://host")


def test_a_local_prediction_loads_nothing_of_triton(precise_bundle: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from meliad_edge.runtime.load import load_predictor;"
        f"load_predictor(Path({str(precise_bundle)!r})); print('tritonclient' in sys.modules, 'grpc' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    assert load_predictor(precise_bundle).engine.name.startswith("onnxruntime")


def test_refused_addresses_are_errors_of_usage() -> None:
    with pytest.raises(UsageError, match="another protocol"):
        parse_triton_url("mqtt://host")
