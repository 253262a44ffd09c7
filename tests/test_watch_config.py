from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from meliad_edge.errors import UsageError
from meliad_edge.event_retention import Retention
from meliad_edge.events import Window
from meliad_edge.runtime.view import WHOLE, Box
from meliad_edge.sinks.destinations import MqttAddress
from meliad_edge.stream.credentials import Credentials
from meliad_edge.watch_config import PageAddress, command_line_cameras, read_watch_config


def write(folder: Path, text: str) -> Path:
    path = folder / "cameras.toml"
    path.write_text(text)
    return path


def test_every_camera_has_settings_of_its_own(tmp_path: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    file = write(
        tmp_path,
        """
        [[camera]]
        source = "rtsp://cam3/live"
        name = "line 3"
        window = "4/6"
        max_fps = 10
        latency_budget_ms = 150
        region = [0, 0, 64, 40]
        tiles = [2, 3]
        mask = "mask.png"
        [[camera]]
        source = "inbox"
        follow = true
        """,
    )
    line3, inbox = read_watch_config(file).camera
    assert (line3.name, line3.max_fps, line3.latency_budget_ms) == ("line 3", 10.0, 150.0)
    assert line3.to_window() == Window(4, 6)
    view = line3.to_view()
    assert (view.region, view.tiles) == (Box(0, 0, 64, 40), (2, 3))
    assert view.ignored is not None and (view.ignored != 0).mean() == 0.5
    assert inbox.follow and inbox.to_view() is WHOLE and inbox.to_window() == Window(3, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[camera]]\nsource = 'a'\nspeed = 3\n", r"unknown key 'camera.0.speed'; a \[\[camera\]\] has source, name,"),
        ("[[camera]]\nname = 'a'\n", "camera.0.source is not allowed: field required"),
        ("[[camera]]\nsource = 'a'\nmax_fps = 0\n", "camera.0.max_fps = 0 is not allowed: input should be greater"),
        ("[[camera]]\nsource = 'a'\nmax_fps = inf\n", "camera.0.max_fps = inf is not allowed"),
        ("[[camera]]\nsource = 'a'\nregion = [0, 0, 0, 5]\n", "width and height be at least 1"),
        ("[[camera]]\nsource = 'a'\ntiles = [0, 2]\n", "between 1 and 16"),
        ("[[camera]]\nsource = 'a'\nwindow = '5/3'\n", "window 5/3: N of M frames"),
        ("[[camera]]\nsource = 'a'\nwindow = '3'\n", "window 3: expected N/M"),
        ("colour = 1\n", r"unknown key 'colour'; the file has camera, camera_secrets, out, keep_days,"),
        ("keep_days = inf\n", "keep_days = inf is not allowed"),
        ("keep_gb = -1\n", "keep_gb = -1 is not allowed"),
        ("[[camera]\n", "must be a TOML file"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_watch_config(write(tmp_path, text))


def test_the_file_says_where_events_and_page_go(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("T0KEN-of-this-line")
    (tmp_path / "password").write_text("S3CR3T\n")
    config = read_watch_config(
        write(
            tmp_path,
            """
            out = ["kept", "mqtt://127.0.0.1/line3"]
            keep_days = 7
            keep_gb = 0.5
            mqtt_user = "me"
            mqtt_password_file = "password"
            serve = "[::1]:8080"
            token_file = "token"
            """,
        )
    )
    folder, (broker,) = config.outputs(environment={})
    assert folder == Path("kept")
    assert isinstance(broker, MqttAddress) and broker.credentials == Credentials("me", "S3CR3T")
    folder, (broker,) = config.outputs(
        environment={"MELIAD_EDGE_MQTT_USER": "you", "MELIAD_EDGE_MQTT_PASSWORD": "other"}
    )
    assert isinstance(broker, MqttAddress) and broker.credentials == Credentials("you", "other")
    assert config.page() == PageAddress("::1", 8080, "T0KEN-of-this-line")
    assert config.retention() == Retention(max_bytes=500_000_000, max_age_s=7 * 86_400.0)


def test_json_says_the_same(tmp_path: Path) -> None:
    config = read_watch_config(write(tmp_path, "out = ['kept']\n[[camera]]\nsource = 'a'\nmask = 'm.png'\n"))
    (tmp_path / "watch.json").write_text(config.model_dump_json())
    assert read_watch_config(tmp_path / "watch.json") == config
    assert config.camera[0].mask == tmp_path / "m.png"


def test_no_error_quotes_an_address(tmp_path: Path) -> None:
    for text in (
        "[[camera]]\nsource = ['rtsp://me:S3CR3T@cam']",
        "[[camera]]\nsource = 'rtsp://me:S3CR3T@cam'\nspeed = 1",
        "out = 'mqtt://me:S3CR3T@broker'",
    ):
        with pytest.raises(UsageError) as caught:
            read_watch_config(write(tmp_path, text))
        assert "S3CR3T" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_the_command_line_names_cameras_too() -> None:
    first, second = command_line_cameras(["a.mp4", "b.mp4"], window="2/2", follow=False)
    assert (first.source, second.source, first.to_window()) == ("a.mp4", "b.mp4", Window(2, 2))
    with pytest.raises(UsageError, match="expected N/M"):
        command_line_cameras(["a.mp4"], window="2", follow=False)
