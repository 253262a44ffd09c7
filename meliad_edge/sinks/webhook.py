"""Events as HTTP requests, signed as the Standard Webhooks specification says (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from urllib.parse import unquote, urlsplit, urlunsplit

from meliad_edge import __version__, strict_json
from meliad_edge.errors import UsageError
from meliad_edge.event_store import Change
from meliad_edge.sinks.delivery import DeliveryError, RejectedError
from meliad_edge.stream.uri import redact

_TIMEOUT_S = 10.0
_SECRET_PREFIX = "whsec_"
_SHORTEST_SECRET_BYTES = 16
# Of the answers 4xx, those that a later attempt may not get: timed out, too early, too many requests.
_TEMPORARY = frozenset({408, 425, 429})


class WebhookDestination:
    """POSTs the record of every state change as JSON; the answer 2xx means that it was taken.

    All attempts at one change have the same ``webhook-id``, so that a receiver can tell a repetition. Redirects are not
    followed and the certificate of ``https`` is verified. A proxy that the environment names is used.

    Args:
        url: ``http://`` or ``https://``; a user and password in it are sent as basic authentication.
        secret: As :func:`signing_key` takes it.
        timeout_s: Longest wait for each step of a request.
        clock: Seconds since 1970.

    Raises:
        UsageError: The secret is too short or cannot be read.
    """

    def __init__(
        self, url: str, secret: str, *, timeout_s: float = _TIMEOUT_S, clock: Callable[[], float] = time.time
    ) -> None:
        self.name = _name(url)
        self._url, self._headers = _take_user_out(url)
        self._key = signing_key(secret)
        self._timeout_s = timeout_s
        self._clock = clock
        self._opener = _opener()

    def keep_up(self) -> None:
        """Nothing to do: every request has a connection of its own."""

    def deliver(self, change: Change) -> None:
        """POST one state change.

        Raises:
            DeliveryError: No answer, or one that says to try again.
            RejectedError: An answer that says not to.
        """
        body = strict_json.dumps(change.record).encode()
        # The parts that are signed are separated by full stops, which event ids have too.
        message_id = f"{change.event.replace('.', '-')}-{change.sequence}"
        timestamp = str(int(self._clock()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"meliad-edge/{__version__}",
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": sign(self._key, message_id, timestamp, body),
            **self._headers,
        }
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        try:
            self._opener.open(request, timeout=self._timeout_s).close()
        except urllib.error.HTTPError as answer:
            with answer:
                self._refuse(answer.code, answer.headers.get("Retry-After"))
        except urllib.error.URLError as error:
            msg = f"no answer ({getattr(error.reason, 'strerror', None) or error.reason})"
            raise DeliveryError(msg) from error
        except (OSError, http.client.HTTPException) as error:
            msg = f"no answer ({error or type(error).__name__})"
            raise DeliveryError(msg) from error

    def close(self) -> None:
        """Nothing is held."""

    def _refuse(self, code: int, retry_after: str | None) -> None:
        status = f"answered {code} {http.client.responses.get(code, '')}".rstrip()
        if 300 <= code < 400:
            msg = f"{status}, and redirects are not followed; give the address it leads to"
            raise DeliveryError(msg)
        if code in _TEMPORARY or code >= 500:
            raise DeliveryError(status, retry_after_s=_seconds_until(retry_after, self._clock()))
        raise RejectedError(status)


def signing_key(secret: str) -> bytes:
    """The key that a shared secret stands for: ``whsec_`` and base64, or any text, of at least 16 bytes.

    Raises:
        UsageError: It is shorter, or what follows ``whsec_`` is not base64.
    """
    if secret.startswith(_SECRET_PREFIX):
        encoded = secret[len(_SECRET_PREFIX) :]
        try:
            key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except (binascii.Error, ValueError):  # Non-ASCII is a ValueError. Neither message is to be seen.
            msg = "the webhook's secret begins with whsec_, but what follows is not base64"
            raise UsageError(msg) from None
    else:
        key = secret.encode()
    if len(key) < _SHORTEST_SECRET_BYTES:
        msg = (
            f"the webhook's secret has {len(key)} bytes, fewer than {_SHORTEST_SECRET_BYTES}; "
            'make one with: echo "whsec_$(openssl rand -base64 32)"'
        )
        raise UsageError(msg)
    return key


def sign(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    """The header ``webhook-signature``: ``v1,`` and the base64 of the HMAC-SHA256 of ``id.timestamp.body``."""
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def _opener() -> urllib.request.OpenerDirector:
    """Without what follows redirects: a signed event goes where the user said and nowhere else."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _name(url: str) -> str:
    """The host, and a digest in place of the path, which for many receivers is a secret."""
    parts = urlsplit(redact(url))
    digest = hashlib.sha256(urlunsplit(parts).encode()).hexdigest()
    return f"{parts.scheme}://{parts.netloc}#{digest[:6]}"


def _take_user_out(url: str) -> tuple[str, dict[str, str]]:
    """The address without user and password, and the header that has them."""
    parts = urlsplit(url)
    user_info, separator, host = parts.netloc.rpartition("@")
    if not separator:
        return url, {}
    credentials = base64.b64encode(unquote(user_info).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {credentials}"}


def _seconds_until(retry_after: str | None, now_s: float) -> float | None:
    """What ``Retry-After`` says, seconds or a date; None where it says nothing that can be understood."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now_s)
    except ValueError:
        return None
