"""An RTSP camera that films a clock: run by the system's Python, which has GStreamer's bindings.

Every picture shows, in black and white blocks, the milliseconds of the monotonic clock at which it was made, so that
whoever has the picture knows its age: 32 bits in two rows, and below them the same bits inverted, against damage.

    python3 clock_camera.py PORT CODEC WIDTH HEIGHT FPS [USER:PASSWORD]

The path is /live; the port that was taken is printed. CODEC is h264 or mjpeg.
"""

import sys
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstApp, GstRtspServer  # noqa: E402, F401

Gst.init(None)
PORT, CODEC, WIDTH, HEIGHT, FPS = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
USER_INFO = sys.argv[6] if len(sys.argv) > 6 else ""
ENCODERS = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=25 bitrate=2000 ! "
    "rtph264pay name=pay0 pt=96 config-interval=1",
    "mjpeg": "jpegenc quality=90 ! rtpjpegpay name=pay0 pt=26",
}
LAUNCH = (
    f"( appsrc name=clock is-live=true do-timestamp=true format=time ! "
    f"video/x-raw,format=I420,width={WIDTH},height={HEIGHT},framerate={FPS}/1 ! {ENCODERS[CODEC]} )"
)


def picture(value: int) -> bytes:
    """The value as an I420 picture of WIDTH x HEIGHT: four rows of sixteen blocks."""
    bits = f"{value % 2**32:032b}"
    inverted = "".join("1" if bit == "0" else "0" for bit in bits)
    rows = (bits[:16], bits[16:], inverted[:16], inverted[16:])
    lines = [b"".join((b"\xeb" if bit == "1" else b"\x10") * (WIDTH // 16) for bit in row) for row in rows]
    luma = b"".join(line * (HEIGHT // 4) for line in lines)
    return luma + b"\x80" * (WIDTH * HEIGHT // 2)


def feed(media: GstRtspServer.RTSPMedia) -> None:
    source = media.get_element().get_by_name_recurse_up("clock")

    def push() -> bool:
        data = picture(round(1000 * time.monotonic()))
        return source.emit("push-buffer", Gst.Buffer.new_wrapped(data)) == Gst.FlowReturn.OK

    GLib.timeout_add(round(1000 / FPS), push)


server = GstRtspServer.RTSPServer()
server.set_address("0.0.0.0")
server.set_service(PORT)
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(LAUNCH)
factory.set_shared(True)
factory.connect("media-configure", lambda factory, media: feed(media))
if USER_INFO:
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_permission_for_role("watcher", "media.factory.access", True)
    permissions.add_permission_for_role("watcher", "media.factory.construct", True)
    factory.set_permissions(permissions)
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "watcher")
    auth = GstRtspServer.RTSPAuth()
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(*USER_INFO.split(":")), token)
    server.set_auth(auth)
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
