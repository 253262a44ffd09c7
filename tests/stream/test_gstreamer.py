"""Pipelines for a Jetson, run by the real GStreamer with stand-ins for the elements that only a Jetson has."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from meliad_edge.errors import SourceError
from meliad_edge.stream.gstreamer import csi_pipeline, decodes_in_hardware, installed_elements, rtsp_pipeline
from meliad_edge.stream.picture_format import CSI_FORMAT, PictureFormat
from meliad_edge.stream.uri import parse_source

SYSTEM_PYTHON = Path("/usr/bin/python3")
# Pulls five samples from the sink of a pipeline and says what they are.
RUN = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import Gst, GstApp
Gst.init(None)
pipeline = Gst.parse_launch(sys.argv[1])
sink = pipeline.iterate_sinks().next()[1]
pipeline.set_state(Gst.State.PLAYING)
for _ in range(5):
    sample = sink.try_pull_sample(10 * Gst.SECOND)
    assert sample is not None
    caps = sample.get_caps().get_structure(0)
    size = caps.get_int("width")[1], caps.get_int("height")[1]
    print(caps.get_string("format"), *size, sample.get_buffer().get_size())
pipeline.set_state(Gst.State.NULL)
"""


def run_pipeline(text: str) -> list[list[str]]:
    done = subprocess.run([SYSTEM_PYTHON, "-c", RUN, text], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def _gstreamer() -> None:
    probe = "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstApp', '1.0')"
    if not SYSTEM_PYTHON.exists() or subprocess.run([SYSTEM_PYTHON, "-c", probe], capture_output=True).returncode:
        pytest.skip("needs GStreamer and the system Python's bindings")


def test_a_csi_camera_is_opened_with_the_format_that_is_asked_for(_gstreamer: None) -> None:
    pipeline = csi_pipeline(1, PictureFormat(640, 360, 15))
    assert "sensor-id=1 " in pipeline and "(memory:NVMM)" in pipeline
    ordinary = pipeline.replace("nvarguscamerasrc sensor-id=1", "videotestsrc is-live=true")
    ordinary = ordinary.replace("(memory:NVMM)", "").replace("nvvidconv", "videoconvert")
    assert run_pipeline(ordinary) == 5 * [["BGR", "640", "360", str(640 * 360 * 3)]]


def test_an_rtsp_camera_with_an_awkward_password_is_quoted_for_gstreamer(_gstreamer: None) -> None:
    address = 'rtsp://me%22%20!:pa%5Css%20w@cam.local:8554/live?x="1"'
    pipeline = rtsp_pipeline(address)
    source, _, rest = pipeline.partition(" ! decodebin ! ")
    script = RUN.partition("pipeline =")[0] + (
        "element = Gst.parse_launch(sys.argv[1])\n"
        "print(element.get_property('location'), element.get_property('user-id'), element.get_property('user-pw'),\n"
        "      element.get_property('latency'), 'tcp' in element.get_property('protocols').value_nicks, sep='\\n')"
    )
    done = subprocess.run([SYSTEM_PYTHON, "-c", script, source], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'rtsp://cam.local:8554/live?x="1"', 'me" !', "pa\\ss w", "0", "True"
    ]  # fmt: skip
    assert rest.startswith("nvvidconv ! ") and rest.endswith("appsink drop=true max-buffers=1 sync=false")


def test_hardware_decodes_only_where_every_element_is(tmp_path: Path) -> None:
    plugins = tmp_path / "usr/lib/aarch64-linux-gnu/gstreamer-1.0"
    plugins.mkdir(parents=True)
    for name in ("libgstrtsp.so", "libgstapp.so", "libgstnvvidconv.so"):
        (plugins / name).touch()
    assert installed_elements(tmp_path) == {"rtspsrc", "appsink", "nvvidconv"}
    assert not decodes_in_hardware(tmp_path)
    (plugins / "libgstnvvideo4linux2.so").touch()
    assert decodes_in_hardware(tmp_path)


def test_formats_on_the_command_line() -> None:
    assert "width=1280,height=720,framerate=30/1" in parse_source("csi://0").address
    assert "width=1920,height=1080,framerate=60/1" in parse_source("csi://0?width=1920&height=1080&fps=60").address
    usb = parse_source("v4l2:///dev/video2?width=1280&height=720")
    assert (usb.address, usb.name, usb.form) == ("/dev/video2", "video2", PictureFormat(1280, 720, 30))
    assert parse_source("v4l2:///dev/video2").form is None
    assert CSI_FORMAT.fps == 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("csi://0?zoom=2", "csi://0\\?zoom=2: 'zoom' is not known; give width, height, fps"),
        ("csi://0?width=0", "width must be a number between 1 and 16384, not '0'"),
        ("v4l2:///dev/video0?fps=30!", "fps must be a number"),
        ("csi://0?width=640 ! filesink", "width must be a number"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused(text: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        parse_source(text)
