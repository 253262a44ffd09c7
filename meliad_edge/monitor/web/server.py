"""Serves the page of a watch beside it, in a thread of its own."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from meliad_edge.errors import UsageError

_logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 2
_MOST_CONNECTIONS = 128
# Of a viewer that takes nothing so much waits in the kernel, for so long; then the connection is cut.
_SEND_BUFFER_BYTES = 256 * 1024
_STALLED_AFTER_MS = 30_000


class WebServer:
    """An application at an address of this machine.

    Args:
        app: What :func:`~meliad_edge.monitor.web.app.create_app` made.
        host: Name or address of this machine; what others can reach needs a token.
        port: 0 takes a free one.
        certificate: PEM file with the certificate and those that vouch for it; with it HTTPS is served.
        key: PEM file with its private key; None when that is in the same file.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._certificate = certificate
        self._key = key
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Begin to serve; returns the URL.

        Raises:
            UsageError: The address cannot be bound, others could reach it without a token, or certificate and key
                cannot be used.
        """
        config = uvicorn.Config(
            self._app,
            http=_Connection,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # What goes wrong is logged by the application.
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MOST_CONNECTIONS,
            backlog=_MOST_CONNECTIONS,  # So many are accepted at once, before any of them can be closed.
            timeout_graceful_shutdown=_STOP_TIMEOUT_S,
            ssl_certfile=self._certificate,
            ssl_keyfile=self._key,
        )
        try:
            config.load()
        except OSError as error:  # as those of OpenSSL are
            msg = f"{self._certificate}: certificate and key cannot be used ({error}); give both as PEM files"
            raise UsageError(msg) from error
        bound, url = self._bind()
        self._server = _Server(config, self._app)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [bound]}, name="web server", daemon=True
        )
        self._thread.start()
        if not self._server.is_ready.wait(_START_TIMEOUT_S):
            msg = f"{url}: the server did not start within {_START_TIMEOUT_S:g} s"
            raise UsageError(msg)
        return url

    def stop(self) -> None:
        """End every response and stop; waits for it."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(2.0 * _STOP_TIMEOUT_S)

    def _bind(self) -> tuple[socket.socket, str]:
        shown = f"{self._host}:{self._port}"
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as error:
            msg = f"{shown}: not an address of this machine ({error.strerror})"
            raise UsageError(msg) from error
        is_local = ipaddress.ip_address(address[0]).is_loopback
        if not is_local and not self._app.state.access.needs_token:
            msg = f"{shown}: other machines could look without a token; give --token-file FILE, or listen on 127.0.0.1"
            raise UsageError(msg)
        if not is_local and self._certificate is None:
            _logger.warning(
                "%s: the token and the pictures travel in the clear; a certificate would encrypt them", shown
            )
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Both are inherited by the connections.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_AFTER_MS)
            bound.bind(address)
        except OSError as error:
            bound.close()
            msg = f"{shown}: cannot be listened on ({error.strerror}); give another address or port"
            raise UsageError(msg) from error
        return bound, self._url(bound)

    def _url(self, bound: socket.socket) -> str:
        address = ipaddress.ip_address(bound.getsockname()[0])
        host = socket.gethostname() if address.is_unspecified else self._host
        scheme = "http" if self._certificate is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"


class _Connection(H11Protocol):
    """Closed for a newer one when there are too many and it has waited longest for a whole request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since_s = self.loop.time()
        if len(self.connections) >= _MOST_CONNECTIONS:
            others = [one for one in self.connections if isinstance(one, _Connection) and one is not self]
            if waiting := [one for one in others if one._is_waiting]:
                longest = min(waiting, key=lambda one: one._waits_since_s)
                self.connections.discard(longest)  # It is lost only in the next round of the loop.
                longest.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._waits_since_s = self.loop.time()

    @property
    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.more_body or self.cycle.response_complete


class _Server(uvicorn.Server):
    """Says when it serves, and ends responses that would not end by themselves when it stops."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self.is_ready = threading.Event()
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for streams in self._app.state.streams:
            streams.close()
        await super().shutdown(sockets)
