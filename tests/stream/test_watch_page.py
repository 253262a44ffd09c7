"""``watch --serve`` through the command line, with a browser's and Prometheus's requests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.device_threshold import threshold_file
from meliad_edge.event_store import EventStore

pytest.importorskip("fastapi", reason="the page needs the extra monitor")
COMMAND = "from meliad_edge.cli import main; main()"


def wait_for(found: Callable[[], Any], timeout_s: float = 40.0) -> Any:
    limit_s = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < limit_s, "did not happen in time"
        time.sleep(0.05)
    return value


@contextmanager
def served_watch(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A watch and the address of its page."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "watch", *map(str, arguments), "--serve", "0"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    lines: list[str] = []
    assert process.stderr is not None
    reading = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
    reading.start()
    try:
        found = wait_for(lambda: re.search(r"page +(http://\S+)", "".join(lines)))
        yield found[1].rstrip("/"), process
    finally:
        process.kill()
        process.wait()
        reading.join(5)
        process.stderr.close()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def send(url: str, method: str, content: Any) -> Any:
    request = urllib.request.Request(
        url, json.dumps(content).encode(), {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(response.read())


def test_a_running_watch_is_seen_judged_and_moved(bundle: Path, mjpeg_server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "events"
    with served_watch(bundle, mjpeg_server.url, "--out", folder, "--window", "1/1") as (url, process):
        wait_for(lambda: json.loads(get(f"{url}/api/v1/events"))["events"])
        assert "<title>" in get(url)
        (camera,) = json.loads(get(f"{url}/api/v1/cameras"))["cameras"]
        assert camera["state"] == "streaming" and "64x48" in camera["description"]
        metrics = get(f"{url}/metrics")
        assert re.search(r'meliad_frames_total\{[^}]*outcome="scored"[^}]*\} [1-9]', metrics)
        assert 'engine="onnxruntime-cpu' in metrics
        event = json.loads(get(f"{url}/api/v1/events"))["events"][0]
        send(f"{url}/api/v1/events/{event['id']}/verdict", "PUT", {"verdict": "confirmed"})
        judged = EventStore(folder).event(event["id"])
        assert judged is not None and judged.verdict is not None
        # Above all that the camera shows: its right half is white.
        moved = send(f"{url}/api/v1/threshold", "PUT", {"value": 1000.0})
        assert moved["threshold"] == 1000.0
        wait_for(lambda: not json.loads(get(f"{url}/api/v1/cameras"))["cameras"][0]["anomaly"])
        assert json.loads(threshold_file(bundle).read_text())["threshold"] == 1000.0
        assert get(f"{url}/healthz") and get(f"{url}/readyz")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_a_watch_that_is_left_alone_waits_for_its_cameras(bundle: Path, mjpeg_server: Any, invoke: Any) -> None:
    mjpeg_server.path = "/later"
    for arguments in ((), ("--serve", "0", "--needs-camera")):
        outcome = invoke("watch", bundle, mjpeg_server.url, *arguments)
        assert (outcome.code, "the server has no such stream (404)" in outcome.err) == (7, True)
    asked = mjpeg_server.unknown
    with served_watch(bundle, mjpeg_server.url) as (url, process):
        wait_for(lambda: mjpeg_server.unknown >= asked + 5)
        mjpeg_server.path = "/live"
        wait_for(lambda: json.loads(get(f"{url}/api/v1/cameras"))["cameras"][0]["state"] == "streaming")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_other_machines_need_a_token(bundle: Path, mjpeg_server: Any, tmp_path: Path, invoke: Any) -> None:
    outcome = invoke("watch", bundle, mjpeg_server.url, "--serve", "0.0.0.0:0", "--max-frames", 1)
    assert outcome.code == 2 and "give --token-file FILE" in outcome.err
    token = tmp_path / "token"
    token.write_text("a token of more than sixteen letters\n")
    token.chmod(0o600)
    with served_watch(bundle, mjpeg_server.url, "--token-file", token) as (url, _):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{url}/api/v1/cameras")
        request = urllib.request.Request(
            f"{url}/api/v1/cameras", headers={"Authorization": "Bearer a token of more than sixteen letters"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.status == 200


@pytest.mark.parametrize("address", ["", "eighty", "host:", "70000", ":8080:"])
def test_an_address_that_makes_no_sense(bundle: Path, address: str, invoke: Any) -> None:
    outcome = invoke("watch", bundle, "belt.mp4", "--serve", address)
    assert outcome.code == 2 and "expected [HOST:]PORT" in outcome.err
