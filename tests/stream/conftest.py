from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.bundle import Exemplar, Manifest, write_bundle
from meliad_edge.calibrate import calibrate
from meliad_edge.precision import DEFAULT_LIMITS
from meliad_edge.runtime.predictor import Prediction, StageTimes
from meliad_edge.runtime.view import View
from meliad_edge.stream import reader

WriteVideo = Callable[..., Path]


@pytest.fixture
def write_video(tmp_path: Path) -> WriteVideo:
    """Write an MJPEG video of uniform frames, given their grey levels."""

    def write(name: str, levels: list[int], size_hw: tuple[int, int] = (48, 64)) -> Path:
        path = tmp_path / name
        height, width = size_hw
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (width, height))
        for level in levels:
            writer.write(np.full((height, width, 3), level, np.uint8))
        writer.release()
        return path

    return write


@pytest.fixture(autouse=True)
def _no_bugs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A bug in a reader ends only its camera; no test may miss it."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == reader.__name__] == []


class BrightnessPredictor:
    """Scores a frame by its mean level; 100 and more is an anomaly. Keeps what it saw."""

    def __init__(self, infer_s: float = 0.0) -> None:
        self.infer_s = infer_s
        self.images: list[NDArray[np.uint8]] = []
        self.batches: list[int] = []

    def predict_all(self, views: Sequence[tuple[NDArray[np.uint8], View]]) -> list[Prediction]:
        time.sleep(self.infer_s)
        self.batches.append(len(views))
        self.images += [image for image, _ in views]
        scores = [float(image.mean()) for image, _ in views]
        times = StageTimes(0.001, 0.002, 0.003)
        return [Prediction(score, 100.0, np.full((4, 4), score, np.float32), (), times) for score in scores]


@pytest.fixture
def predictor() -> BrightnessPredictor:
    return BrightnessPredictor()


@pytest.fixture
def slow_predictor() -> BrightnessPredictor:
    return BrightnessPredictor(infer_s=0.1)


@dataclass
class MjpegServer:
    """Motion JPEG over HTTP on loopback; its stream counts up in grey levels and can be cut and brought back."""

    port: int = 0
    frame_rate: float = 50.0
    size_hw: tuple[int, int] = (48, 64)
    user_info: str = ""
    path: str = "/live"
    unknown: int = 0
    connections: int = 0
    sent: int = 0
    is_cut: bool = False
    _server: ThreadingHTTPServer | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/live"

    def start(self) -> None:
        self.is_cut = False
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def cut(self) -> None:
        """End every connection and refuse new ones."""
        self.is_cut = True
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stream = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                expected = "Basic " + base64.b64encode(stream.user_info.encode()).decode()
                if stream.user_info and self.headers.get("Authorization") != expected:
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                    self.end_headers()
                    return
                if self.path != stream.path:
                    stream.unknown += 1
                    self.send_error(404)
                    return
                stream.connections += 1
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._stream()

            def _stream(self) -> None:
                while not stream.is_cut:
                    level = stream.sent % 250
                    picture = np.full((*stream.size_hw, 3), level, np.uint8)
                    picture[:, stream.size_hw[1] // 2 :] = 255  # The right half is white.
                    _, jpeg = cv2.imencode(".jpg", picture)
                    data = jpeg.tobytes()
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    self.wfile.write(head.encode() + data + b"\r\n")
                    stream.sent += 1
                    time.sleep(1.0 / stream.frame_rate)

        return Handler


@pytest.fixture
def mjpeg_server() -> Iterator[MjpegServer]:
    server = MjpegServer()
    server.start()
    yield server
    server.cut()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A real bundle whose evidence is the mean level of each of 4x4 cells, with its threshold just above 100."""
    onnx = pytest.importorskip("onnx", reason="writing a test model needs the extra export")
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        brightness (uint8[N, 32, 32, 3] frames)
            => (float[N] score_raw, float[N, 4, 4] map_raw, int64[N, 2, 4, 4] nearest)
        <int64[1] axis_one = {1}>
        {
            levels = Cast<to = 1>(frames)
            grey = ReduceMean<axes = [3], keepdims = 0>(levels)
            grey_channel = Unsqueeze(grey, axis_one)
            pooled = AveragePool<kernel_shape = [8, 8], strides = [8, 8]>(grey_channel)
            map_raw = Squeeze(pooled, axis_one)
            score_raw = ReduceMax<axes = [1, 2], keepdims = 0>(map_raw)
            zero_map = Sub(pooled, pooled)
            planes = Concat<axis = 1>(zero_map, zero_map)
            nearest = Cast<to = 7>(planes)
        }
        """
    )
    path = tmp_path / "brightness.meliad"
    manifest = Manifest(
        name="brightness", detector="test", backbone="none", input_hw=(32, 32), grid_hw=(4, 4), top_cells=1,
        precisions={"fp32": DEFAULT_LIMITS["fp32"]},
        created_by="tests", dataset="none", licence="none", train_normals=3, shots=1,
    )  # fmt: skip
    exemplar = Exemplar("crack", "exp3.jpg", 0, 0, 8, 8, np.zeros((48, 48, 3), np.uint8))
    write_bundle(path, manifest, {"fp32": model.SerializeToString()}, calibrate([60.0, 80.0, 100.0]), [], [exemplar])
    return path
