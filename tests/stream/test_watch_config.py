from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from meliad_edge.errors import UsageError
from meliad_edge.events import Window
from meliad_edge.runtime.view import WHOLE, Box
from meliad_edge.stream.watch_config import command_line_cameras, read_watch_config


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
        ("camera = []\n", "camera = .* is not allowed"),
        ("[[camera]\n", "must be a TOML file"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_watch_config(write(tmp_path, text))


def test_no_error_quotes_an_address(tmp_path: Path) -> None:
    for text in ("source = ['rtsp://me:S3CR3T@cam']", "source = 'rtsp://me:S3CR3T@cam'\nspeed = 1"):
        with pytest.raises(UsageError) as caught:
            read_watch_config(write(tmp_path, f"[[camera]]\n{text}\n"))
        assert "S3CR3T" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_the_command_line_names_cameras_too() -> None:
    first, second = command_line_cameras(["a.mp4", "b.mp4"], window="2/2", follow=False)
    assert (first.source, second.source, first.to_window()) == ("a.mp4", "b.mp4", Window(2, 2))
    with pytest.raises(UsageError, match="expected N/M"):
        command_line_cameras(["a.mp4"], window="2", follow=False)
