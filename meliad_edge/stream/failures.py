"""Why a source cannot be read, found out after the fact.

OpenCV says only that opening failed. So the question is put again without it: to the file system for files and
devices, and to the server, in its own protocol, for network cameras. What that cannot tell, and what is said then:
a server that answers this question well but not OpenCV's is reported as ``CODEC``, as is an unsupported codec.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import re
import socket
import ssl
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from meliad_edge.errors import SourceError
from meliad_edge.stream.uri import SourceKind, SourceUri

_DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322}


class FailureKind(Enum):
    """What kind of failure it is; decides whether trying again can help."""

    NOT_FOUND = "not found"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    AUTH = "authentication failed"
    PERMISSION = "no permission"
    ENDED = "ended"
    CODEC = "cannot be decoded"


_ADVICE = {
    FailureKind.NOT_FOUND: "check the address for typing errors",
    FailureKind.REFUSED: "check the port and that the camera is not in use by another program",
    FailureKind.TIMEOUT: "check the network and that the camera is switched on",
    FailureKind.AUTH: "check user and password in the camera's web page",
    FailureKind.PERMISSION: "check its permissions, and for the network the rules of the firewall",
    FailureKind.ENDED: "check the camera",
    FailureKind.CODEC: "open it with a video player to see whether it is intact",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a source could not be opened or stopped delivering.

    Attributes:
        kind: Its class.
        detail: What was seen, without credentials.
    """

    kind: FailureKind
    detail: str

    def to_error(self, source: SourceUri) -> SourceError:
        """The one-line error of a source that is given up."""
        return SourceError(f"{source.shown}: {self.detail}; {_ADVICE[self.kind]}")


def diagnose(source: SourceUri, *, timeout_s: float = 3.0) -> Failure:
    """Find out why OpenCV could not open a source.

    Args:
        source: What could not be opened.
        timeout_s: Limit for each answer from the network.
    """
    try:
        if source.kind is SourceKind.RTSP:
            return _from_status(_rtsp_status(urlsplit(source.address), timeout_s))
        if source.kind is SourceKind.HTTP:
            return _from_status(_http_status(urlsplit(source.address), timeout_s))
        if source.kind is SourceKind.CSI:
            return Failure(FailureKind.REFUSED, "the camera stack delivers no video")
        return _from_file_system(Path(source.address))
    except (UnicodeError, http.client.InvalidURL):
        return Failure(FailureKind.NOT_FOUND, "the address is not valid")
    except http.client.HTTPException:
        return Failure(FailureKind.REFUSED, "the server answers, but not in HTTP")
    except OSError as error:
        return _from_os_error(error)


def _from_file_system(path: Path) -> Failure:
    if path.is_char_device():
        with path.open("rb", buffering=0):
            return Failure(FailureKind.REFUSED, "the device delivers no video")
    size = path.stat().st_size
    return Failure(FailureKind.CODEC, f"not a video that can be decoded ({size:,} bytes); it is damaged or incomplete")


def _from_os_error(error: OSError) -> Failure:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError) or getattr(reason, "errno", None) in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return Failure(FailureKind.TIMEOUT, "no answer (timeout)")
    if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_AGAIN:
        return Failure(FailureKind.TIMEOUT, "the host name cannot be looked up now")
    if isinstance(reason, socket.gaierror):
        return Failure(FailureKind.NOT_FOUND, "the host name is not known")
    if isinstance(reason, FileNotFoundError):
        return Failure(FailureKind.NOT_FOUND, "no such file or device")
    if isinstance(reason, PermissionError):
        return Failure(FailureKind.PERMISSION, "no permission to read it")
    if isinstance(reason, ConnectionRefusedError):
        return Failure(FailureKind.REFUSED, "connection refused")
    name = getattr(reason, "strerror", None) or type(reason).__name__
    return Failure(FailureKind.REFUSED, f"cannot be opened ({name})")


def _from_status(status: int) -> Failure:
    if status in (401, 403):
        return Failure(FailureKind.AUTH, f"authentication failed ({status})")
    if status in (404, 410):
        return Failure(FailureKind.NOT_FOUND, f"the server has no such stream ({status})")
    if status >= 400 or status < 200:
        return Failure(FailureKind.REFUSED, f"the server refuses the stream ({status})")
    return Failure(FailureKind.CODEC, "the server answers, but sends no video that can be decoded")


def _http_status(address: SplitResult, timeout_s: float) -> int:
    plain_url = address._replace(netloc=_host_and_port(address)).geturl()
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    if address.username is not None:
        passwords.add_password(None, plain_url, unquote(address.username), unquote(address.password or ""))
    opener = urllib.request.build_opener(
        urllib.request.HTTPBasicAuthHandler(passwords),
        urllib.request.HTTPDigestAuthHandler(passwords),
        urllib.request.HTTPSHandler(context=_tls_context()),
    )
    try:
        with opener.open(plain_url, timeout=timeout_s) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except UnicodeError:  # of the host's name; a ValueError too
        raise
    except ValueError:  # urllib asked with the credentials and was refused again, by a scheme that it does not know
        return 401


def _rtsp_status(address: SplitResult, timeout_s: float) -> int:
    """Status of a DESCRIBE request (RFC 2326), with credentials if the server asks for them."""
    host, port = address.hostname or "", address.port or _DEFAULT_PORTS[address.scheme]
    url = address._replace(netloc=_host_and_port(address)).geturl()
    with closing(socket.create_connection((host, port), timeout=timeout_s)) as plain:
        connection = _tls_context().wrap_socket(plain, server_hostname=host) if address.scheme == "rtsps" else plain
        answer = _describe(connection, url, 1, "")
        challenge = re.search(r"^WWW-Authenticate: *(Digest|Basic)(.*)$", answer, re.IGNORECASE | re.MULTILINE)
        if _status(answer) == 401 and challenge is not None and address.username is not None:
            user, password = unquote(address.username), unquote(address.password or "")
            if challenge[1].lower() == "basic":
                credentials = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
            else:
                credentials = _digest(challenge[2], user, password, url)
            answer = _describe(connection, url, 2, f"Authorization: {credentials}\r\n")
    return _status(answer)


def _describe(connection: socket.socket, url: str, sequence: int, header: str) -> str:
    request = f"DESCRIBE {url} RTSP/1.0\r\nCSeq: {sequence}\r\nAccept: application/sdp\r\n{header}\r\n"
    connection.sendall(request.encode())
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < 65536:
        received = connection.recv(4096)
        if not received:
            break
        answer += received
    return answer.decode("latin-1")


def _status(answer: str) -> int:
    match = re.match(r"RTSP/\d\.\d (\d{3})", answer)
    return int(match[1]) if match else 0


def _digest(challenge: str, user: str, password: str, url: str) -> str:
    """Digest response of RFC 2069, which RTSP servers still speak."""
    fields = dict(re.findall(r'(\w+)="?([^",]*)"?', challenge))
    realm, nonce = fields.get("realm", ""), fields.get("nonce", "")
    secret = _md5(f"{user}:{realm}:{password}")
    response = _md5(f"{secret}:{nonce}:{_md5(f'DESCRIBE:{url}')}")
    return f'Digest username="{user}", realm="{realm}", nonce="{nonce}", uri="{url}", response="{response}"'


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _host_and_port(address: SplitResult) -> str:
    return address.netloc.rpartition("@")[2]


def _tls_context() -> ssl.SSLContext:
    """Cameras have self-signed certificates, and FFmpeg does not verify them either; ours only asks the same again."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
