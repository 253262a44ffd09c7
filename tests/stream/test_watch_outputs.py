"""``watch`` with several places for its events, through the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from meliad_edge.event_store import EventStore

WriteVideo = Callable[..., Path]
GOOD, BAD = 20, 200
LEVELS = [GOOD] * 8 + [BAD] * 6 + [GOOD] * 8


class Receiver:
    """Takes what is posted to it."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["webhook-signature"].startswith("v1,")
                receiver.records.append(json.loads(body))
                self.send_response(204)
                self.end_headers()

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("MELIAD_EDGE_WEBHOOK_SECRET", "a secret of more than sixteen bytes")
    made = Receiver()
    yield made
    made.close()


def test_events_are_kept_and_delivered(
    receiver: Receiver, bundle: Path, write_video: WriteVideo, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    folder = tmp_path / "events"
    outcome = invoke("watch", bundle, write_video("belt.avi", LEVELS), "--out", folder, "--out", receiver.url, "--json")
    assert outcome.code == 0, outcome.err
    (event,) = EventStore(folder).events()
    assert [(record["event"], record["state"]) for record in receiver.records] == [(event.id, "new"), (event.id, "end")]
    (delivery,) = json.loads(outcome.out.splitlines()[-1])["deliveries"]
    assert (delivery["delivered"], delivery["pending"], delivery["is_up"]) == (2, 0, True)
    assert (event.state, event.camera, event.kind) == ("end", "belt.avi", "anomaly")
    frame = cv2.imread(str(event.folder / "frame.png"))
    assert frame.mean() == pytest.approx(BAD, abs=3)
    assert cv2.imread(str(event.folder / "picture.jpg")).shape == frame.shape
    assert (event.folder / "clip-000.jpg").is_file()


def test_what_nobody_took_is_delivered_by_the_next_watch(
    receiver: Receiver, bundle: Path, write_video: WriteVideo, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    folder, video = tmp_path / "events", write_video("belt.avi", LEVELS)
    address = receiver.server.server_address
    receiver.close()
    outcome = invoke("watch", bundle, video, "--out", folder, "--out", receiver.url)
    assert outcome.code == 0
    assert "0 delivered, 2 kept for the next start" in outcome.err
    assert receiver.records == []
    receiver.server = HTTPServer(address, receiver.server.RequestHandlerClass)
    threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    outcome = invoke("watch", bundle, video, "--out", folder, "--out", receiver.url)
    assert "4 delivered\n" in outcome.err
    assert [record["state"] for record in receiver.records] == ["new", "end", "new", "end"]
    assert [record["event"] for record in receiver.records[::2]] == [e.id for e in EventStore(folder).events()][::-1]


def test_a_folder_is_needed_and_only_one(receiver: Receiver, bundle: Path, tmp_path: Path, invoke: Any) -> None:
    outcome = invoke("watch", bundle, "belt.avi", "--out", receiver.url)
    assert outcome.code == 2 and "name a folder beside it" in outcome.err
    outcome = invoke("watch", bundle, "belt.avi", "--out", tmp_path / "a", "--out", tmp_path / "b")
    assert outcome.code == 2 and "events are kept in one folder" in outcome.err
    assert not (tmp_path / "a").exists()


def test_a_camera_file_names_what_is_watched(
    bundle: Path, write_video: WriteVideo, tmp_path: Path, invoke: Any
) -> None:
    write_video("belt.avi", LEVELS)
    config = tmp_path / "cameras.toml"
    config.write_text(f'[[camera]]\nsource = "{tmp_path}/belt.avi"\nname = "line 3"\nwindow = "1/1"\n')
    outcome = invoke("watch", bundle, "--config", config, "--json", "--out", tmp_path / "events")
    assert outcome.code == 0, outcome.err
    records = [json.loads(line) for line in outcome.out.splitlines()]
    assert (records[0]["camera"], records[0]["first_frame"], records[0]["last_frame"]) == ("line 3", 8, 8)
    assert invoke("watch", bundle).code == 2


def test_a_camera_whose_mask_leaves_nothing_free_is_given_up_and_the_others_are_watched(
    bundle: Path, write_video: WriteVideo, tmp_path: Path, invoke: Any
) -> None:
    for name in ("a", "b"):
        write_video(f"{name}.avi", LEVELS)
    cv2.imwrite(str(tmp_path / "mask.png"), np.full((48, 64), 255, np.uint8))
    config = tmp_path / "cameras.toml"
    config.write_text(
        f'[[camera]]\nsource = "{tmp_path}/a.avi"\nmask = "mask.png"\n[[camera]]\nsource = "{tmp_path}/b.avi"'
    )
    outcome = invoke("watch", bundle, "--config", config, "--json")
    assert outcome.code == 9, outcome.err
    assert "a.avi      the mask covers all that is looked at; leave something free" in outcome.err
    (source,) = json.loads(outcome.out.splitlines()[-1])["sources"]
    assert (source["name"], source["frames"]["scored"]) == ("b.avi", len(LEVELS))


def test_credentials_for_a_camera_that_is_not_there_are_a_typing_error(
    bundle: Path, write_video: WriteVideo, tmp_path: Path, invoke: Any
) -> None:
    secrets = tmp_path / "secrets.toml"
    secrets.write_text('["line 3"]\nuser = "me"\npassword = "S3CR3T"\n')
    secrets.chmod(0o600)
    outcome = invoke("watch", bundle, write_video("belt.avi", LEVELS), "--camera-secrets", secrets)
    assert outcome.code == 2
    assert "credentials for line 3, but there is no such camera; there are belt.avi" in outcome.err
    assert "S3CR3T" not in outcome.err


@pytest.mark.parametrize("option", ["--keep-days", "--keep-gb"])
def test_a_retention_that_is_no_number(bundle: Path, option: str, tmp_path: Path, invoke: Any) -> None:
    outcome = invoke("watch", bundle, "belt.avi", "--out", tmp_path / "events", option, "inf")
    assert outcome.code == 2 and "must be a finite number" in outcome.err
    assert invoke("watch", bundle, "belt.avi", "--out", tmp_path / "events", option, "nan").code == 2
