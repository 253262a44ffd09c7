from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meliad_edge.errors import SourceError
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import SourceKind, parse_source, redact, with_unique_names


@pytest.mark.parametrize(
    ("text", "kind", "name", "address"),
    [
        ("belt.mp4", SourceKind.VIDEO, "belt.mp4", "belt.mp4"),
        ("file:///data/my%20belt.mp4", SourceKind.VIDEO, "my belt.mp4", "/data/my belt.mp4"),
        ("file://localhost/data/belt.mp4", SourceKind.VIDEO, "belt.mp4", "/data/belt.mp4"),
        ("file://belt.mp4", SourceKind.VIDEO, "belt.mp4", "belt.mp4"),
        ("part.PNG", SourceKind.IMAGES, "part.PNG", "part.PNG"),
        ("parts/*.png", SourceKind.IMAGES, "parts/*.png", "parts/*.png"),
        (
            "rtsp://u:p@cam3.local:8554/stream",
            SourceKind.RTSP,
            "cam3.local/stream",
            "rtsp://u:p@cam3.local:8554/stream",
        ),
        ("RTSPS://cam3.local/", SourceKind.RTSP, "cam3.local", "RTSPS://cam3.local/"),
        ("http://10.0.0.7/mjpg?fps=5", SourceKind.HTTP, "10.0.0.7/mjpg", "http://10.0.0.7/mjpg?fps=5"),
        ("https://10.0.0.7/mjpg", SourceKind.HTTP, "10.0.0.7/mjpg", "https://10.0.0.7/mjpg"),
        ("v4l2:///dev/video2", SourceKind.V4L2, "video2", "/dev/video2"),
    ],
)
def test_parses_what_the_command_line_takes(text: str, kind: SourceKind, name: str, address: str) -> None:
    source = parse_source(text)
    assert (source.kind, source.name, source.address) == (kind, name, address)
    assert source.is_live == (kind not in (SourceKind.VIDEO, SourceKind.IMAGES))


def test_a_folder_is_images_and_a_file_with_brackets_is_a_file(tmp_path: Path) -> None:
    odd = tmp_path / "belt[1].mp4"
    odd.touch()
    assert parse_source(str(tmp_path)).kind is SourceKind.IMAGES
    assert parse_source(str(odd)).kind is SourceKind.VIDEO


def test_a_path_that_cannot_be_looked_up_is_refused() -> None:
    with pytest.raises(SourceError, match="File name too long; check that the place can be reached"):
        parse_source("x" * 300)


def test_csi_becomes_a_gstreamer_pipeline_and_is_refused_without_gstreamer() -> None:
    cv2 = pytest.importorskip("cv2")
    source = parse_source("csi://1")
    assert source.address.startswith("nvarguscamerasrc sensor-id=1 ! ")
    assert source.address.endswith("appsink drop=true max-buffers=1 sync=false")
    if cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        pytest.skip("this OpenCV has GStreamer")
    reader = open_source(source)
    reader._run()
    with pytest.raises(SourceError, match=r"csi://1: needs OpenCV with GSTREAMER"):
        raise reader.error or AssertionError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/x", r"scheme ftp:// is not known; give .*rtsp://.*csi://N"),
        ("", "empty"),
        ("rtsp:///stream", "no host"),
        ("rtsp://u:secret@cam:port/x", r"^rtsp://cam:port/x: host or port cannot be read"),
        ("v4l2://video0", "expected a device path"),
        ("csi://left", "expected a sensor number"),
        ("http://host/belt.mp4", "download it"),
    ],
)
def test_refuses_what_it_cannot_read(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        parse_source(text)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None  # The cause would quote what it could not read in a traceback.


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("rtsp://admin:pw@10.0.0.7:554/live", "rtsp://10.0.0.7:554/live"),
        ("open rtsps://a:b@h/x failed, then http://c:d@i/y", "open rtsps://h/x failed, then http://i/y"),
        ("rtsp://10.0.0.7/user=admin&password=tl&channel=1", "rtsp://10.0.0.7/user=***&password=***&channel=1"),
        ("http://h/cgi?USR=me&PWD=pw", "http://h/cgi?USR=***&PWD=***"),
        ("http://h/mjpg?access_token=S&loginpas=S&fps=5", "http://h/mjpg?access_token=***&loginpas=***&fps=5"),
        ("http://h/live.cgi?loginuse=me&loginpas=S", "http://h/live.cgi?loginuse=***&loginpas=***"),
        ("http://h/snap?apikey=S&api_key=S&X-API-Key=S", "http://h/snap?apikey=***&api_key=***&X-API-Key=***"),
        ("http://h/x?client_secret=S&SessionID=S&_sid=S", "http://h/x?client_secret=***&SessionID=***&_sid=***"),
        ("https://h/x?se=2027&sig=S%3D&X-Amz-Signature=S", "https://h/x?se=2027&sig=***&X-Amz-Signature=***"),
        ("rtsp://h/channel=1_user=me_password=S_x.sdp?real", "rtsp://h/channel=1_user=***"),
        ("open http://h/x?authcode=S failed: timeout=5", "open http://h/x?authcode=*** failed: timeout=5"),
        ("belt.mp4 at 10:30, mail me@example.com", "belt.mp4 at 10:30, mail me@example.com"),
    ],
)
def test_redacts(text: str, clean: str) -> None:
    assert redact(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://10.0.0.7/cam/realmonitor?channel=1&subtype=0",
        "http://10.0.0.7/axis-cgi/mjpg/video.cgi?resolution=1280x720&compression=30&camera=1",
        "rtsp://10.0.0.7/Streaming/Channels/101?transportmode=unicast&profile=Profile_1",
        "http://keys.example/pass/stream?fps=5",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert redact(text) == parse_source(text).shown == text


_printable = st.characters(min_codepoint=33, max_codepoint=126)


@given(before=st.text(_printable, max_size=8), after=st.text(_printable, max_size=8))
def test_no_password_survives_redaction(before: str, after: str) -> None:
    assert "S3CR3T" not in redact(f"cannot open rtsp://me:{before}S3CR3T{after}@cam.local/stream now")


def test_credentials_are_only_in_the_address() -> None:
    source = parse_source("rtsp://me:S3CR3T@cam.local/live?token=S3CR3T")
    assert "S3CR3T" in source.address
    assert "S3CR3T" not in repr(source) + source.name + source.shown


def test_sources_get_different_names() -> None:
    sources = [parse_source(text) for text in ("a/x.mp4", "b/x.mp4", "b/x.mp4", "y.mp4")]
    assert [source.name for source in with_unique_names(sources)] == ["a/x.mp4", "b/x.mp4", "b/x.mp4#2", "y.mp4"]
