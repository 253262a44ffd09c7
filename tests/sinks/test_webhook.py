"""Webhooks to a real HTTP server on this machine."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.errors import UsageError
from meliad_edge.event_store import Change, EventStore
from meliad_edge.sinks.delivery import Delivery, DeliveryError, RejectedError
from meliad_edge.sinks.webhook import WebhookDestination, sign, signing_key

KEY = b"0123456789abcdef01234567"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
NOW_S = 1_790_000_000.0

WriteChange = Callable[..., dict[str, Any]]
Finish = Callable[[Delivery], None]
MakeCertificate = Callable[[str], tuple[Path, Path]]


@dataclass
class Request:
    headers: dict[str, str]
    path: str
    body: bytes

    @property
    def is_signed(self) -> bool:
        """As a receiver checks it that knows the key and the specification alone."""
        signed = b".".join((self.headers["webhook-id"].encode(), self.headers["webhook-timestamp"].encode(), self.body))
        expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
        return self.headers["webhook-signature"] == f"v1,{expected}" and "." not in self.headers["webhook-id"]


@dataclass
class Receiver:
    """Keeps every request; answers with the next of its answers, then with 204."""

    answers: list[Any] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"


def serve(receiver: Receiver, context: ssl.SSLContext | None = None) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.requests.append(Request(headers, self.path, body))
            answer = receiver.answers.pop(0) if receiver.answers else 204
            if answer == "hang":
                receiver.release.wait(60.0)
                return
            if answer == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if answer == "babble":
                self.wfile.write(b"who is there?\r\n\r\n")
                return
            self.send_response(answer)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"x" * 100_000 if answer != 204 else b"")

        do_GET = do_POST

    server = ThreadingHTTPServer(("127.0.0.1", receiver.port), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    receiver.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    server = serve(receiver)
    yield receiver
    receiver.release.set()
    server.shutdown()
    server.server_close()


def open_webhook(url: str, *, secret: str = SECRET, timeout_s: float = 20.0) -> WebhookDestination:
    return WebhookDestination(url, secret, timeout_s=timeout_s, clock=lambda: NOW_S)


def change(sequence: int = 7, **changes: Any) -> Change:
    event = "20260921T141320.000Z-000001"
    record = {"type": "event", "event": event, "camera": "belt — ü", "score": 1.5, "picture": f"{event}/picture.jpg"}
    return Change(sequence, event, None, {**record, **changes}, Path("/nowhere") / event)


def test_the_signature_is_that_of_the_specification() -> None:
    """The example that the reference libraries of Standard Webhooks are tested with."""
    assert (
        sign(
            signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            "1614265330",
            b'{"test": 2432232314}',
        )
        == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


def test_a_change_is_posted_signed(receiver: Receiver) -> None:
    open_webhook(receiver.url + "?line=1").deliver(change())
    (request,) = receiver.requests
    assert request.is_signed
    assert request.path == "/hook?line=1"
    assert json.loads(request.body) == change().record
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-timestamp"] == "1790000000"
    assert request.headers["user-agent"].startswith("meliad-edge/")
    assert "authorization" not in request.headers


def test_any_text_is_a_secret_that_is_long_enough(receiver: Receiver) -> None:
    open_webhook(receiver.url, secret=KEY.decode()).deliver(change())
    assert receiver.requests[0].is_signed


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("", "has 0 bytes, fewer than 16"),
        ("S3CR3Tshort", "has 11 bytes"),
        ("whsec_" + base64.b64encode(b"S3CR3T").decode(), "has 6 bytes"),
        ("whsec_S3CR3T not base64!", "what follows is not base64"),
        ("whsec_S3CR3Tü0123456789abcdef", "what follows is not base64"),
    ],
)
def test_a_weak_secret_is_refused_and_not_shown(secret: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_webhook("https://example.com", secret=secret)
    assert "S3CR3T" not in str(caught.value)


def test_a_secret_may_lack_its_padding() -> None:
    assert signing_key("whsec_" + base64.b64encode(b"0123456789abcdef").decode().rstrip("=")) == b"0123456789abcdef"


def test_all_attempts_at_a_change_have_one_id_and_another_change_has_another(receiver: Receiver) -> None:
    receiver.answers = [500]
    with pytest.raises(DeliveryError):
        open_webhook(receiver.url).deliver(change())
    open_webhook(receiver.url).deliver(change())  # After a restart.
    open_webhook(receiver.url).deliver(change(sequence=8))
    first, second, other = (request.headers["webhook-id"] for request in receiver.requests)
    assert first == second != other


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_what_is_taken(receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    open_webhook(receiver.url).deliver(change())


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_what_is_tried_again(receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    with pytest.raises(DeliveryError, match=f"^answered {status}"):
        open_webhook(receiver.url).deliver(change())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 410, 413, 422, 451])
def test_what_is_refused_for_good(receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    with pytest.raises(RejectedError, match=f"^answered {status} [A-Z]"):
        open_webhook(receiver.url).deliver(change())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    receiver.headers = {"Location": f"http://127.0.0.1:{receiver.port}/elsewhere"}
    with pytest.raises(DeliveryError, match=f"answered {status} .*, and redirects are not followed"):
        open_webhook(receiver.url).deliver(change())
    assert [request.path for request in receiver.requests] == ["/hook"]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        (format_datetime(datetime.fromtimestamp(NOW_S + 90.0, tz=timezone.utc), usegmt=True), 90.0),
        (format_datetime(datetime.fromtimestamp(NOW_S - 90.0, tz=timezone.utc), usegmt=True), 0.0),
        ("soon", None),
        ("-5", None),
        ("", None),
    ],
)
def test_what_the_receiver_says_about_trying_again(receiver: Receiver, header: str, seconds: float | None) -> None:
    receiver.answers = [503]
    receiver.headers = {"Retry-After": header}
    with pytest.raises(DeliveryError) as caught:
        open_webhook(receiver.url).deliver(change())
    assert caught.value.retry_after_s == seconds


@pytest.mark.parametrize(("answer", "timeout_s"), [("hang", 0.2), ("drop", 20.0), ("babble", 20.0)])
def test_a_receiver_that_does_not_answer_is_tried_again(receiver: Receiver, answer: str, timeout_s: float) -> None:
    receiver.answers = [answer]
    with pytest.raises(DeliveryError, match="^no answer "):
        open_webhook(receiver.url, timeout_s=timeout_s).deliver(change())


def test_nobody_there(receiver: Receiver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(DeliveryError, match="Connection refused"):
        open_webhook(f"http://127.0.0.1:{port}/").deliver(change())
    with pytest.raises(DeliveryError, match="^no answer "):
        open_webhook("http://nowhere.invalid/").deliver(change())


def test_user_and_password_are_sent_and_not_shown(receiver: Receiver) -> None:
    webhook = open_webhook(f"http://m%40e:S3CR3T%2F@127.0.0.1:{receiver.port}/hook")
    receiver.answers = [500]
    with pytest.raises(DeliveryError) as caught:
        webhook.deliver(change())
    (request,) = receiver.requests
    assert request.headers["authorization"] == "Basic " + base64.b64encode(b"m@e:S3CR3T/").decode()
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert "S3CR3T" not in webhook.name + str(caught.value)


def test_the_name_is_stable_and_tells_receivers_apart_without_their_paths() -> None:
    url = "https://home.local:8123/api/webhook/S3CR3T"
    name = open_webhook(url).name
    assert name.startswith("https://home.local:8123#")
    assert "S3CR3T" not in name
    assert open_webhook(url, secret="another secret of some length").name == name
    assert (
        open_webhook("https://me:pw@home.local:8123/api/webhook/S3CR3T").name == name
    )  # A new password, the same hook.
    assert open_webhook(url + "2").name != name
    assert open_webhook(url + "?line=2").name != name


@pytest.mark.parametrize(
    ("host", "is_trusted", "is_taken"),
    [("localhost", True, True), ("localhost", False, False), ("other.example", True, False)],
)
def test_the_certificate_is_verified(
    make_certificate: MakeCertificate, monkeypatch: pytest.MonkeyPatch, host: str, is_trusted: bool, is_taken: bool
) -> None:
    certificate, key = make_certificate(host)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    receiver = Receiver()
    server = serve(receiver, context)
    try:
        webhook = open_webhook(f"https://localhost:{receiver.port}/hook")
        if is_taken:
            webhook.deliver(change())
        else:
            with pytest.raises(DeliveryError, match="certificate verify failed"):
                webhook.deliver(change())
        assert len(receiver.requests) == is_taken
    finally:
        server.shutdown()
        server.server_close()


def test_a_receiver_that_fails_now_and_then_gets_everything_it_does_not_refuse_in_order(
    store: EventStore, write_change: WriteChange, receiver: Receiver, caplog: pytest.LogCaptureFixture, finish: Finish
) -> None:
    receiver.answers = [500, 200, 400, "drop", "hang", 302, 200]
    delivery = Delivery(store, open_webhook(receiver.url, timeout_s=2.0), wait=lambda event, delay_s: None)
    records = [write_change(number=number) for number in range(1, 6)]
    finish(delivery)
    assert all(request.is_signed for request in receiver.requests)
    sent = [json.loads(request.body)["event"][-1] for request in receiver.requests]
    assert sent == ["1", "1", "2", "3", "3", "3", "3", "4", "5"]
    assert json.loads(receiver.requests[-1].body) == records[-1]
    per_change: dict[str, set[str]] = {}
    for number, request in zip(sent, receiver.requests, strict=True):
        per_change.setdefault(number, set()).add(request.headers["webhook-id"])
    assert all(len(identities) == 1 for identities in per_change.values())
    status = delivery.status
    assert (status.delivered, status.rejected, status.failed_attempts, status.pending) == (4, 1, 4, 0)


def test_a_receiver_that_is_down_for_long_gets_everything_afterwards(
    store: EventStore, write_change: WriteChange
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        receiver = Receiver(port=reserved.getsockname()[1])
    down = Delivery(store, open_webhook(receiver.url), wait=lambda event, delay_s: event.wait(0.001))
    for number in range(1, 21):
        write_change(number=number)
    down.close(timeout_s=0.05)
    assert down.status.pending == 20
    assert not down.status.is_up
    server = serve(receiver)
    try:
        Delivery(store, open_webhook(receiver.url)).close(timeout_s=60.0)
    finally:
        server.shutdown()
        server.server_close()
    assert [json.loads(request.body)["event"] for request in receiver.requests] == [
        f"20260921T141320.000Z-{number:06x}" for number in range(1, 21)
    ]
