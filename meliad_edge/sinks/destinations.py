"""What an ``--out`` stands for: a folder, a webhook or an MQTT broker."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from meliad_edge.errors import MissingExtraError, UsageError
from meliad_edge.sinks.delivery import Destination
from meliad_edge.stream.credentials import Credentials
from meliad_edge.stream.uri import redact

_logger = logging.getLogger(__name__)

WEBHOOK_SECRET = "MELIAD_EDGE_WEBHOOK_SECRET"
MQTT_USER = "MELIAD_EDGE_MQTT_USER"
MQTT_PASSWORD = "MELIAD_EDGE_MQTT_PASSWORD"
_MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_DEFAULT_PREFIX = "meliad"
_KNOWN = "a folder, file:///PATH, https://HOST/PATH, http://, mqtt://HOST/PREFIX or mqtts://"


@dataclass(frozen=True, slots=True)
class WebhookAddress:
    """A receiver of HTTP requests.

    Attributes:
        url: With its credentials; not part of the representation.
        secret: What requests are signed with; not part of the representation.
    """

    url: str = field(repr=False)
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class MqttAddress:
    """A place on a broker.

    Attributes:
        host, port: Where the broker is.
        is_encrypted: Whether it is spoken to through TLS.
        prefix: First levels of every topic.
        credentials: What the broker asks for; None where it asks for nothing.
    """

    host: str
    port: int
    is_encrypted: bool
    prefix: str
    credentials: Credentials | None = None

    @property
    def name(self) -> str:
        """The address without credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' if self.is_encrypted else ''}://{host}:{self.port}/{self.prefix}"


def in_file(variable: str) -> str:
    """The variable that names a file which holds what another variable would."""
    return f"{variable}_FILE"


def parse_destination(text: str, *, environment: Mapping[str, str] = os.environ) -> Path | WebhookAddress | MqttAddress:
    """Parse one ``--out``; nothing is opened.

    The secret of a webhook is in the variable ``MELIAD_EDGE_WEBHOOK_SECRET``; user and password of a broker are in its
    address or in ``MELIAD_EDGE_MQTT_USER`` and ``MELIAD_EDGE_MQTT_PASSWORD``. Secret and password may be in a file
    instead, which the same variable with ``_FILE`` names.

    Args:
        text: A path, ``file://``, ``https://``, ``http://``, ``mqtts://`` or ``mqtt://``.
        environment: Where the variables are.

    Raises:
        UsageError: Another scheme, an incomplete address, or a secret that is missing or cannot be read.
    """
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator and text:
        return Path(text)
    if scheme == "file" and rest:
        return Path(re.sub(r"^localhost(?=/)", "", unquote(rest)))
    if scheme in ("http", "https"):
        return _parse_webhook(text, environment)
    if scheme in _MQTT_PORTS:
        return _parse_mqtt(text, environment)
    msg = f"--out {redact(text)}: not a destination; give {_KNOWN}"
    raise UsageError(msg)


def parse_folder(text: str) -> Path:
    """The folder that a path or ``file://`` names.

    Raises:
        UsageError: Something else.
    """
    destination = parse_destination(text)
    if not isinstance(destination, Path):
        msg = f"--out {redact(text)}: not supported in this version; give a folder, as a path or file:///PATH"
        raise UsageError(msg)
    return destination


def open_destination(address: WebhookAddress | MqttAddress, cameras: Sequence[str]) -> Destination:
    """What delivers to an address; nothing is sent before it is used.

    Args:
        address: As parsed.
        cameras: Names of what is watched, which a broker announces.

    Raises:
        UsageError: The secret of a webhook is too short or cannot be read.
        MissingExtraError: A broker is to be spoken to and paho-mqtt is not installed.
    """
    if isinstance(address, WebhookAddress):
        from meliad_edge.sinks.webhook import WebhookDestination

        return WebhookDestination(address.url, address.secret)
    try:
        from meliad_edge.sinks.mqtt import MqttDestination
    except ImportError as error:
        raise MissingExtraError("paho-mqtt", "monitor") from error
    return MqttDestination(address, cameras)


def _parse_webhook(text: str, environment: Mapping[str, str]) -> WebhookAddress:
    parts = _split(text)
    # The path is not shown: for many receivers it is a secret.
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    secret = _read_secret(WEBHOOK_SECRET, environment)
    if secret is None:
        msg = (
            f"--out {shown}: requests are signed; set {WEBHOOK_SECRET}, or {in_file(WEBHOOK_SECRET)} or the key "
            "webhook_secret_file of --config to the file that holds the secret; make one with: "
            'echo "whsec_$(openssl rand -base64 32)"'
        )
        raise UsageError(msg)
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        _logger.warning("%s: events travel in the clear; use https://", shown)
    return WebhookAddress(text, secret)


def _parse_mqtt(text: str, environment: Mapping[str, str]) -> MqttAddress:
    parts = _split(text)
    shown = redact(text)
    if parts.query or parts.fragment:
        msg = f"--out {shown}: expected {parts.scheme}://HOST[:PORT][/PREFIX], without '?' and '#'"
        raise UsageError(msg)
    prefix = unquote(parts.path).strip("/") or _DEFAULT_PREFIX
    if re.search(r"[+#\x00-\x1f\x7f]|^\$|//", prefix):
        msg = f"--out {shown}: topics cannot begin with {prefix!r}; use letters, digits, '-', '_' and '/'"
        raise UsageError(msg)
    user = unquote(parts.username or "") or environment.get(MQTT_USER, "")
    password = unquote(parts.password or "") or _read_secret(MQTT_PASSWORD, environment) or ""
    if password and not user:
        msg = f"--out {shown}: a password without a user; set {MQTT_USER}"
        raise UsageError(msg)
    if password and parts.scheme == "mqtt" and not _is_loopback(parts.hostname):
        _logger.warning("%s: the password travels in the clear; use mqtts://", shown)
    return MqttAddress(
        host=parts.hostname or "",
        port=parts.port or _MQTT_PORTS[parts.scheme],
        is_encrypted=parts.scheme == "mqtts",
        prefix=prefix,
        credentials=Credentials(user, password) if user else None,
    )


def _split(text: str) -> SplitResult:
    """The parts of an address that has a host.

    Raises:
        UsageError: It has none, or it can be read in two ways.
    """
    try:
        parts = urlsplit(text)
        _ = parts.port  # Checked only when it is read.
        is_clear = "@" not in parts._replace(netloc="").geturl()
    except ValueError:
        is_clear = False
    if not is_clear:
        # A '/' in a password ends the host as urlsplit sees it, and the rest would be shown. No cause: it quotes.
        msg = f"--out {redact(text)}: cannot be read; write '/', '?', '#' and '@' as %2F, %3F, %23 and %40"
        raise UsageError(msg) from None
    if not parts.hostname or any(not character.isprintable() or character.isspace() for character in text):
        msg = f"--out {redact(text)}: no host that could be asked; give {_KNOWN}"
        raise UsageError(msg)
    return parts


def _read_secret(variable: str, environment: Mapping[str, str]) -> str | None:
    if value := environment.get(variable):
        return value
    file = environment.get(in_file(variable))
    if not file:
        return None
    try:
        secret = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        msg = f"{in_file(variable)}: {file} cannot be read ({reason}); name the file that holds the secret alone"
        raise UsageError(msg) from None
    if not secret:
        msg = f"{in_file(variable)}: {file} is empty; write the secret into it"
        raise UsageError(msg)
    return secret


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
