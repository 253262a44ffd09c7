"""What a Triton model repository and its clients agree on: names, the digest that tells models apart, addresses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from meliad_edge.errors import UsageError

# Key of the digest of the bundle's graph among the parameters of a served model.
DIGEST = "meliad_model_sha256"
FRAMES = "frames"

_SCHEMES = {"grpc": False, "grpcs": True}
_PORT = 8001


@dataclass(frozen=True, slots=True)
class TritonAddress:
    """Where a model is served.

    Attributes:
        target: Host and port, as gRPC takes them.
        is_encrypted: Whether the server is spoken to through TLS.
        model: Name of the model there; None is that of the bundle.
    """

    target: str
    is_encrypted: bool
    model: str | None = None

    @property
    def shown(self) -> str:
        """The address of the server, for messages."""
        return f"grpc{'s' if self.is_encrypted else ''}://{self.target}"


def parse_triton_url(url: str) -> TritonAddress:
    """Parse the address of a Triton server; nothing is opened.

    Args:
        url: ``grpc://HOST[:PORT][/MODEL]``, or ``grpcs://`` for TLS; the port is 8001 where none is named.

    Raises:
        UsageError: It is something else.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        _refuse(url, str(error))
    if parts.scheme not in _SCHEMES:
        _refuse(url, "another protocol")
    if not host or parts.username is not None or parts.query or parts.fragment:
        _refuse(url, "no host, or more than an address")
    model = unquote(parts.path.strip("/"))
    if model != served_name(model):
        _refuse(url, "no name of a model")
    bracketed = f"[{host}]" if ":" in host else host
    return TritonAddress(f"{bracketed}:{_PORT if port is None else port}", _SCHEMES[parts.scheme], model or None)


def served_name(name: str) -> str:
    """The name of a bundle as that of a folder and a served model: ASCII letters, digits, ``_``, ``.`` and ``-``."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")


def _refuse(url: str, reason: str) -> NoReturn:
    # Whatever stands before an '@' may be a password.
    shown = re.sub(r"(?<=://)\S*@", "", url)
    msg = f"--triton {shown}: not the address of a Triton server ({reason}); give grpc://HOST:PORT or grpcs://HOST:PORT"
    raise UsageError(msg)
