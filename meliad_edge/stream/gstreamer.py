"""Pipelines for cameras that only GStreamer opens, and for decoding in hardware; as text, nothing is started here."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from meliad_edge.stream.picture_format import PictureFormat

# What the pipelines are made of: the element, and the plugin file it is in.
ELEMENT_PLUGINS = {
    "nvarguscamerasrc": "libgstnvarguscamerasrc.so",
    "nvvidconv": "libgstnvvidconv.so",
    "nvv4l2decoder": "libgstnvvideo4linux2.so",
    "v4l2src": "libgstvideo4linux2.so",
    "rtspsrc": "libgstrtsp.so",
    "appsink": "libgstapp.so",
}
# Jetson's converter copies to ordinary memory, in four channels; OpenCV takes three. The newest frame replaces others.
_TO_OPENCV = (
    "nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! "
    "appsink drop=true max-buffers=1 sync=false"
)
_TIMEOUT_US = 5_000_000


def installed_elements(root: Path = Path("/")) -> set[str]:
    """Which of the elements the system's GStreamer has, by their plugin files."""
    plugins = {path.name for path in root.glob("usr/lib/*/gstreamer-1.0/libgst*.so")}
    return {element for element, plugin in ELEMENT_PLUGINS.items() if plugin in plugins}


def decodes_in_hardware(root: Path = Path("/")) -> bool:
    """Whether network streams can be decoded by a Jetson's own decoder."""
    return {"rtspsrc", "nvv4l2decoder", "nvvidconv", "appsink"} <= installed_elements(root)


def csi_pipeline(sensor: int, form: PictureFormat) -> str:
    """A CSI camera of a Jetson through its camera stack."""
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! video/x-raw(memory:NVMM),width={form.width},height={form.height},"
        f"framerate={form.fps}/1 ! {_TO_OPENCV}"
    )


def rtsp_pipeline(address: str) -> str:
    """An RTSP camera over TCP; ``decodebin`` takes the decoder in hardware where there is one.

    Args:
        address: With credentials, which become properties of the source.
    """
    parts = urlsplit(address)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    user = ""
    if parts.username is not None:
        user = f"user-id={_quoted(unquote(parts.username))} user-pw={_quoted(unquote(parts.password or ''))} "
    return (
        f"rtspsrc location={_quoted(plain)} {user}protocols=tcp latency=0 tcp-timeout={_TIMEOUT_US} ! "
        f"decodebin ! {_TO_OPENCV}"
    )


def _quoted(text: str) -> str:
    """As a value in the language of pipelines."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
