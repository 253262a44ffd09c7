"""What a source is called on the command line, parsed once; credentials never leave this module unredacted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from meliad_edge.data.images import IMAGE_SUFFIXES
from meliad_edge.errors import SourceError
from meliad_edge.stream.gstreamer import csi_pipeline
from meliad_edge.stream.picture_format import CSI_FORMAT, USB_FORMAT, PictureFormat, parse_format

_VIDEO_FILE_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
_KNOWN = "a path, a folder, a glob, file://, rtsp://, rtsps://, http://, https://, v4l2:///dev/videoN or csi://N"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Greedy up to the last '@' of the word: a password may itself hold '@', '/' or ':'. Too much is better than too little.
_USER_INFO = re.compile(r"(?<=://)\S*@")
# Every vendor has names of its own, such as loginpas or access_token: what merely looks like one of them is hidden too.
_SECRET_PARAMETER = re.compile(
    r"((?:user|usr|login|pas|pwd|token|auth|key|secret|sess|_sid|sig|cred)[^\s/?&=]*)=[^\s&]+", re.IGNORECASE
)


class SourceKind(Enum):
    """How a source is read."""

    VIDEO = "video"
    IMAGES = "images"
    RTSP = "rtsp"
    HTTP = "http"
    V4L2 = "v4l2"
    CSI = "csi"


@dataclass(frozen=True, slots=True)
class SourceUri:
    """One source of the command line.

    Attributes:
        kind: How it is read.
        name: Short label for events and reports, without credentials.
        shown: The whole address without credentials.
        address: What is opened: a path, a glob, a URL with its credentials, a device, or a GStreamer pipeline.
            Not part of the representation.
        form: What a V4L2 device is asked for; None takes what it offers.
    """

    kind: SourceKind
    name: str
    shown: str
    address: str = field(repr=False)
    form: PictureFormat | None = None

    @property
    def is_live(self) -> bool:
        """Whether frames arrive by the clock and are lost when nobody takes them."""
        return self.kind not in (SourceKind.VIDEO, SourceKind.IMAGES)


def redact(text: str) -> str:
    """Remove ``user:password@`` of every address in a text, and the values of parameters that hold credentials.

    >>> redact("rtsp://admin:se@cret/1@10.0.0.7:554/live?channel=1&pwd=x")
    'rtsp://10.0.0.7:554/live?channel=1&pwd=***'
    """
    return _SECRET_PARAMETER.sub(r"\1=***", _USER_INFO.sub("", text))


def parse_source(text: str) -> SourceUri:
    """Parse one SOURCE argument; nothing is opened.

    Args:
        text: A path, folder, glob, or an address with one of the known schemes.

    Raises:
        SourceError: Unknown scheme, an address that lacks what its scheme needs, or a path that cannot be looked up.
    """
    match = _SCHEME.match(text)
    if match is None:
        return _parse_path(text, text)
    scheme = match[1].lower()
    if scheme == "file":
        # Both file:///absolute and, as on Jetson, file://relative.
        return _parse_path(re.sub(r"^localhost(?=/)", "", unquote(text[match.end() :])), text)
    if scheme in ("rtsp", "rtsps", "http", "https"):
        return _parse_network(text, SourceKind.RTSP if scheme.startswith("rtsp") else SourceKind.HTTP)
    rest = text[match.end() :]
    if scheme == "v4l2":
        device, asks, query = rest.partition("?")
        if not re.fullmatch(r"/dev/\S+", device):
            msg = f"{redact(text)}: expected a device path as in v4l2:///dev/video0"
            raise SourceError(msg)
        form = _parse_format(text, query, USB_FORMAT) if asks else None
        return SourceUri(SourceKind.V4L2, name=Path(device).name, shown=text, address=device, form=form)
    if scheme == "csi":
        sensor, _, query = rest.partition("?")
        if not sensor.isdecimal():
            msg = f"{redact(text)}: expected a sensor number as in csi://0"
            raise SourceError(msg)
        pipeline = csi_pipeline(int(sensor), _parse_format(text, query, CSI_FORMAT))
        return SourceUri(SourceKind.CSI, name=f"csi{sensor}", shown=text, address=pipeline)
    msg = f"{redact(text)}: scheme {scheme}:// is not known; give {_KNOWN}"
    raise SourceError(msg)


def with_unique_names(sources: Sequence[SourceUri]) -> list[SourceUri]:
    """Name sources that share a short name by their whole address, and equal ones also by a number."""
    short = Counter(source.name for source in sources)
    seen: Counter[str] = Counter()
    named = []
    for source in sources:
        name = source.name if short[source.name] == 1 else source.shown
        seen[name] += 1
        named.append(replace(source, name=name if seen[name] == 1 else f"{name}#{seen[name]}"))
    return named


def _parse_path(text: str, shown: str) -> SourceUri:
    if not text:
        msg = f"the source {shown!r} is empty; give {_KNOWN}"
        raise SourceError(msg)
    path = Path(text)
    try:
        is_glob = bool(set("*?[") & set(text)) and not path.exists()
        is_folder = path.is_dir()
    except OSError as error:  # As of a share whose server is away; a path that is not there is no error yet.
        msg = f"{shown}: {error.strerror}; check that the place can be reached"
        raise SourceError(msg) from error
    if is_glob or is_folder:
        return SourceUri(SourceKind.IMAGES, name=text if is_glob else path.resolve().name, shown=shown, address=text)
    kind = SourceKind.IMAGES if path.suffix.lower() in IMAGE_SUFFIXES else SourceKind.VIDEO
    return SourceUri(kind, name=path.name, shown=shown, address=text)


def _parse_format(text: str, query: str, default: PictureFormat) -> PictureFormat:
    try:
        return parse_format(query, default)
    except ValueError as error:
        msg = f"{redact(text)}: {error}"
        raise SourceError(msg) from None


def _parse_network(text: str, kind: SourceKind) -> SourceUri:
    shown = redact(text)
    parts = _split(text, shown)
    if not parts.hostname:
        msg = f"{shown}: no host in the address; write {parts.scheme}://HOST/PATH"
        raise SourceError(msg)
    if kind is SourceKind.HTTP and Path(parts.path).suffix.lower() in _VIDEO_FILE_SUFFIXES:
        msg = f"{shown}: a video file over HTTP would be watched again and again; download it and give its path"
        raise SourceError(msg)
    return SourceUri(kind, name=redact(f"{parts.hostname}{parts.path.rstrip('/')}"), shown=shown, address=text)


def _split(text: str, shown: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        _ = parts.port  # Checked only when it is read.
    except ValueError:
        msg = f"{shown}: host or port cannot be read; in a password write '/', '?' and '#' as %2F, %3F and %23"
        raise SourceError(msg) from None  # The cause quotes the part it could not read, which can be the password.
    return parts
