from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from meliad_edge.errors import UsageError
from meliad_edge.monitor.token import read_token
from meliad_edge.monitor.web.access import SESSION_S, Access

TOKEN = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PUBLIC = ["/healthz", "/readyz", "/login", "/static/login.js", "/static/page.css", "/static/icon.svg"]
PRIVATE = [
    "/metrics", "/openapi.json", "/static/page.js", "/static/index.html", "/api/v1/about", "/api/v1/cameras",
    "/api/v1/cameras/0/snapshot.jpg", "/api/v1/cameras/0/live.mjpg", "/api/v1/events", "/api/v1/threshold",
    "/api/v1/updates", "/nothing",
]  # fmt: skip


def raw(site: Any, request: str, body: bytes = b"") -> str:
    """The response to a request exactly as it is written, which no HTTP client would send."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20.0) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received.decode("latin-1")


@pytest.mark.parametrize("path", PRIVATE)
def test_without_the_token_nothing_is_told(locked_site: Any, path: str) -> None:
    response = locked_site.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert "belt" not in response.text


@pytest.mark.parametrize("path", PUBLIC)
def test_what_is_public_tells_nothing_of_the_watch(locked_site: Any, path: str) -> None:
    response = locked_site.get(path)
    assert response.status_code == 200
    for secret in ("belt", "10.0.0.", TOKEN, "line3"):
        assert secret not in response.text


def test_the_token_opens_the_door(locked_site: Any) -> None:
    assert locked_site.get("/api/v1/cameras", headers=BEARER).status_code == 200
    assert locked_site.get("/metrics", headers=BEARER).status_code == 200
    assert locked_site.get("/api/v1/cameras", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"]
)
def test_another_token_does_not(locked_site: Any, given: str) -> None:
    assert locked_site.get("/api/v1/cameras", headers={"Authorization": given}).status_code == 401


def test_a_token_in_the_address_is_none(locked_site: Any) -> None:
    assert locked_site.get("/api/v1/cameras", params={"token": TOKEN}).status_code == 401


def test_the_page_sends_whoever_is_unknown_to_log_in(locked_site: Any) -> None:
    response = locked_site.get("/")
    assert (response.status_code, response.headers["location"]) == (303, "/login")


def test_a_session_is_a_cookie_that_no_script_and_no_other_site_has(locked_site: Any) -> None:
    with locked_site.client() as client:
        response = client.post("/login", json={"token": TOKEN})
        assert response.status_code == 204
        cookie = response.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", f"Max-Age={SESSION_S}", "Path=/"} <= set(cookie.split("; "))
        assert TOKEN not in cookie
        assert client.get("/api/v1/cameras").status_code == 200
        assert client.get("/").status_code == 200
        assert client.post("/logout").status_code == 204
        assert client.get("/api/v1/cameras").status_code == 401


def test_a_session_that_was_made_up_is_none(locked_site: Any) -> None:
    with locked_site.client() as client:
        client.post("/login", json={"token": TOKEN})
        ((name, value),) = client.cookies.items()
    expires, _, signature = value.partition(".")
    later = f"{int(expires) + 1}.{signature}"
    for forged in (
        "",
        ".",
        later,
        f"{expires}.",
        f"{expires}.{'0' * 64}",
        f"٣.{signature}",
        f"{'9' * 5000}.{signature}",
    ):
        headers = {"Cookie": f"{name}={forged}".encode()}
        assert locked_site.get("/api/v1/cameras", headers=headers).status_code == 401, forged[:80]


def test_a_session_ends() -> None:
    now_s = 1_790_000_000.0
    access = Access(TOKEN, wall_clock=lambda: now_s)
    session = access.new_session()

    def standing(of: Access) -> str:
        scope = {"type": "http", "headers": [(b"cookie", f"meliad-session-80={session}".encode())], "server": ("x", 80)}
        from starlette.requests import HTTPConnection

        return of.standing(HTTPConnection(scope))

    assert standing(access) == "known"
    assert standing(Access("another-token-of-16-characters", wall_clock=lambda: now_s)) == "unknown"
    now_s += SESSION_S + 1
    assert standing(access) == "unknown"


def test_whoever_guesses_must_wait(locked_site: Any) -> None:
    with locked_site.client() as client, locked_site.client() as known:
        known.post("/login", json={"token": TOKEN})
        for _ in range(5):
            assert client.post("/login", json={"token": "a-wrong-token"}).status_code == 401
        refused = client.post("/login", json={"token": TOKEN})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
        assert client.get("/api/v1/cameras", headers=BEARER).status_code == 429
        assert known.get("/api/v1/cameras").status_code == 200, "who has a session is not affected"
        locked_site.watch.now_s += 61.0
        assert client.post("/login", json={"token": TOKEN}).status_code == 204


def test_guessing_as_a_bearer_is_limited_too(locked_site: Any) -> None:
    wrong = {"Authorization": "Bearer a-wrong-token"}
    statuses = [locked_site.get("/metrics", headers=wrong).status_code for _ in range(7)]
    assert statuses == [401] * 5 + [429] * 2


def test_guesses_are_kept_of_a_bounded_number_of_addresses() -> None:
    access = Access(TOKEN, clock=lambda: 0.0)
    for number in range(5000):
        access.check_token(f"2001:db8::{number:x}", "a-wrong-token")
    assert len(access._failures) <= 1024


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.5",
        "",
        "[",
        "127.0.0.1@evil.example",
    ],
)
def test_a_name_that_is_not_of_this_machine_is_refused(site: Any, host: str) -> None:
    response = raw(site, f"GET /api/v1/cameras HTTP/1.1\nHost: {host}\nConnection: close")
    assert response.startswith(("HTTP/1.1 421", "HTTP/1.1 400"))
    assert "belt" not in response


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1:80", "[::1]:8000", "127.0.0.2"])
def test_every_name_of_this_machine_will_do(site: Any, host: str) -> None:
    assert raw(site, f"GET /api/v1/cameras HTTP/1.1\nHost: {host}\nConnection: close").startswith("HTTP/1.1 200")


FOREIGN = [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": ""}, {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_another_site_changes_nothing(site: Any, headers: dict[str, str]) -> None:
    event = site.watch.begin_anomaly("belt")
    with site.client(headers=headers) as client:
        assert client.put(f"/api/v1/events/{event.id}/verdict", json={"verdict": "rejected"}).status_code == 403
        assert client.put("/api/v1/threshold", json={"value": 5.0}).status_code == 403
        assert client.delete("/api/v1/threshold").status_code == 403
        assert client.post("/login", json={"token": TOKEN}).status_code == 403
    assert site.watch.store.event(event.id).verdict is None
    assert site.watch.threshold.calibration == site.watch.threshold.shipped


def test_another_site_embeds_nothing(site: Any) -> None:
    site.watch.decide("belt", site.watch.begin_anomaly("belt").frame.image)
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert site.get("/api/v1/cameras/0/snapshot.jpg", headers=embedded).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert site.get("/", headers=link).status_code == 200


def test_the_page_itself_may_change_things(site: Any) -> None:
    for headers in ({"Origin": site.url}, {"Sec-Fetch-Site": "same-origin", "Origin": site.url}, {}):
        with site.client(headers=headers) as client:
            assert client.put("/api/v1/threshold", json={"value": 5.0}).status_code == 200


def test_every_response_is_protected(site: Any, locked_site: Any) -> None:
    paths = ["/", "/static/page.js", "/api/v1/cameras", "/nothing", "/metrics"]
    for response in [*(site.get(path) for path in paths), *(locked_site.get(path) for path in paths)]:
        headers = response.headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data: blob:;")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
        assert "cache-control" in headers


TRAVERSALS = ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "....//", "%00", "events.sqlite"]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_nothing_outside_an_event_is_read(site: Any, name: str) -> None:
    event = site.watch.begin_anomaly("belt")
    secret = site.watch.folder / "events" / "secret.jpg"
    secret.write_bytes(b"secret")
    paths = [
        f"/api/v1/events/{name}", f"/api/v1/events/{name}/files/picture.jpg", f"/api/v1/events/{event.id}/files/{name}",
        f"/api/v1/events/{event.id}/files/..%2fsecret.jpg", f"/api/v1/events/{event.id}/files/../secret.jpg",
        f"/static/{name}", f"/static/..%2f{name}",
    ]  # fmt: skip
    for path in paths:
        response = raw(site, f"GET {path} HTTP/1.1\nHost: localhost\nConnection: close")
        assert response.startswith(("HTTP/1.1 404", "HTTP/1.1 422")), path
        assert "secret\r\n" not in response
        assert "root:" not in response


def test_a_large_body_is_refused(site: Any) -> None:
    large = b'{"value": 1.0}' + b" " * 20_000
    with site.client() as client:
        response = client.put("/api/v1/threshold", content=large, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.headers["content-type"]) == (413, "application/problem+json")
        chunked = client.put(
            "/api/v1/threshold",
            content=iter([large[:9000], large[9000:]]),
            headers={"Content-Type": "application/json"},
        )
        assert chunked.status_code == 413
    announced = "PUT /api/v1/threshold HTTP/1.1\nHost: localhost\nConnection: close\nContent-Length: 99999999999999"
    assert raw(site, announced).startswith("HTTP/1.1 413")
    assert site.watch.threshold.calibration == site.watch.threshold.shipped


def test_a_token_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    assert read_token(file) == TOKEN


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 40, b"two lines of a\ntoken that is long", "ä".encode() * 20]
)
def test_a_bad_token_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="--token-file") as caught:
        read_token(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(tmp_path / "missing")


def test_a_token_that_is_not_ascii_is_just_wrong(locked_site: Any) -> None:
    response = httpx.post(locked_site.url + "/login", json={"token": "ä" * 20}, trust_env=False)
    assert response.status_code == 401
