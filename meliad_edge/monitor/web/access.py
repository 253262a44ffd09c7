"""Who may see the page: a token for other machines, none for this one, and no other site in either case."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

SESSION_S = 30 * 86_400
# Nobody but a person mistypes a token, and a person who does so five times can wait a minute.
_MOST_FAILURES = 5
_FORGOTTEN_AFTER_S = 60.0
_MOST_ADDRESSES = 1024

Standing = Literal["known", "unknown", "refused"]


class Access:
    """Decides who is let in.

    Without a token everybody on this machine is, as long as the page is asked for by a name of this machine: another
    site, whose name an attacker lets point here, is not (DNS rebinding).

    A session is a time of expiry with its HMAC under the token. So it survives a restart of the watch, nothing is kept
    here, and a new token ends all of them.

    Args:
        token: What a bearer must know; None lets in everybody who reaches the page under a name of this machine.
        wall_clock: Seconds since 1970.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        token: str | None,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._token = token
        self._wall_clock = wall_clock
        self._clock = clock
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    @property
    def needs_token(self) -> bool:
        """Whether whoever looks must know a token."""
        return self._token is not None

    def is_host_allowed(self, host: str) -> bool:
        """Whether the page may be asked for under this name, a ``Host`` header."""
        if self.needs_token:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def standing(self, connection: HTTPConnection) -> Standing:
        """How a client stands: known, unknown, or refused for a minute because it has guessed too often."""
        if self._token is None or self._has_session(connection):
            return "known"
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return "unknown"
        return self.check_token(address_of(connection), given.strip())

    def check_token(self, address: str, given: str) -> Standing:
        """How a client stands that gives a token."""
        now_s = self._clock()
        failures = [failed_s for failed_s in self._failures.get(address, []) if now_s - failed_s < _FORGOTTEN_AFTER_S]
        if len(failures) >= _MOST_FAILURES:
            return "refused"
        if self._token is not None and hmac.compare_digest(given.encode(), self._token.encode()):
            self._failures.pop(address, None)
            return "known"
        self._failures[address] = [*failures, now_s]
        self._failures.move_to_end(address)
        if len(self._failures) > _MOST_ADDRESSES:
            self._failures.popitem(last=False)
        return "unknown"

    def new_session(self) -> str:
        """The value of the cookie of somebody who has given the token."""
        expires = str(int(self._wall_clock()) + SESSION_S)
        return f"{expires}.{self._sign(expires)}"

    def _has_session(self, connection: HTTPConnection) -> bool:
        expires, _, signature = connection.cookies.get(cookie_name(connection), "").partition(".")
        if not (expires.isascii() and expires.isdecimal() and len(expires) < 16):
            return False
        is_ours = hmac.compare_digest(signature.encode(), self._sign(expires).encode())
        return is_ours and self._wall_clock() < int(expires)

    def _sign(self, expires: str) -> str:
        assert self._token is not None
        message = f"meliad-edge session until {expires}"
        return hmac.new(self._token.encode(), message.encode(), hashlib.sha256).hexdigest()


def address_of(connection: HTTPConnection) -> str:
    """Address of a client, without its port."""
    return connection.client.host if connection.client is not None else ""


def cookie_name(connection: HTTPConnection) -> str:
    """Name of the cookie; cookies know no ports, and two watches of one machine differ by nothing else."""
    server = connection.scope.get("server")
    return f"meliad-session-{server[1]}" if server else "meliad-session"


def is_from_another_site(connection: HTTPConnection, method: str) -> bool:
    """Whether a browser says that another site made this request.

    Browsers say so in ``Sec-Fetch-Site``, but only of addresses that they trust (HTTPS and this machine); the
    ``Origin`` of what changes something comes always. Programs other than browsers send neither.
    """
    headers = connection.headers
    site = headers.get("sec-fetch-site")
    if site is not None:
        is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return site not in ("same-origin", "none") and not is_link
    origin = headers.get("origin")
    return origin is not None and origin.rpartition("//")[2] != headers.get("host")
