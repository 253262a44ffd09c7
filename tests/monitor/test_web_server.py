from __future__ import annotations

import datetime
import logging
import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from meliad_edge.errors import MissingExtraError, UsageError
from meliad_edge.monitor.web.server import WebServer


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that vouches for itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_a_token_others_cannot_look(watch: Any, host: str) -> None:
    with pytest.raises(UsageError, match="give --token-file FILE"):
        WebServer(watch.make_app(), host).start()


def test_with_a_token_they_can(locked_site: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = WebServer(locked_site.watch.make_app(), "0.0.0.0")
    with caplog.at_level(logging.WARNING):
        url = server.start()
    assert "in the clear" in caplog.text
    port = url.rpartition(":")[2]
    response = httpx.get(f"http://127.0.0.1:{port}/healthz", headers={"Host": "device.example"}, trust_env=False)
    assert response.status_code == 200
    server.stop()


def test_an_address_that_cannot_be_bound_is_one_line(watch: Any, site: Any) -> None:
    port = int(site.url.rpartition(":")[2])
    with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}: cannot be listened on") as caught:
        WebServer(watch.make_app(), port=port).start()
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="not an address of this machine"):
        WebServer(watch.make_app(), "no-such-host.invalid").start()


def test_it_stops_while_somebody_looks_and_starts_again(watch: Any, pictures: Any) -> None:
    watch.decide("belt", pictures(40))
    server = WebServer(watch.make_app())
    url = server.start()
    with (
        httpx.Client(base_url=url, trust_env=False) as client,
        client.stream("GET", "/api/v1/updates") as updates,
        client.stream("GET", "/api/v1/cameras/0/live.mjpg") as live,
    ):
        messages, parts = updates.iter_lines(), live.iter_bytes()
        assert next(messages).startswith("data: ")
        assert b"image/jpeg" in next(parts)
        server.stop()
        for _ in messages:  # Both end, and end properly: else this raises or never returns.
            pass
        for _ in parts:
            pass
    again = WebServer(watch.make_app(), port=int(url.rpartition(":")[2]))
    assert again.start() == url
    assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    again.stop()


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(4096) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def test_connections_that_ask_nothing_give_their_place_to_those_that_do(watch: Any, pictures: Any, site: Any) -> None:
    watch.decide("belt", pictures(40))
    host, port = site.url.removeprefix("http://").split(":")
    half = b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with (
        site.client() as client,
        client.stream("GET", "/api/v1/cameras/0/live.mjpg") as live,
        ExitStack() as stack,
    ):
        parts = live.iter_bytes()
        assert b"image/jpeg" in next(parts)
        idle = []
        for number in range(300):
            idle.append(stack.enter_context(socket.create_connection((host, int(port)))))
            idle[-1].sendall((b"", b"GET /", half)[number % 3])
            if number in (140, 299):
                assert site.get("/healthz").status_code == 200
        assert [is_open(connection) for connection in idle[:100]] == [False] * 100
        assert sum(is_open(connection) for connection in idle) < 128
        watch.decide("belt", pictures(41))
        assert b"image/jpeg" in next(parts)  # Whoever looks stays.


def test_with_a_certificate_it_is_https(locked_site: Any, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    server = WebServer(locked_site.watch.make_app(), "localhost", certificate=certificate, key=key)
    url = server.start()
    assert url.startswith("https://localhost:")
    context = ssl.create_default_context(cafile=str(certificate))
    with httpx.Client(base_url=url, verify=context, trust_env=False) as client:
        assert client.get("/healthz").status_code == 200
        response = client.post("/login", json={"token": "correct-horse-battery-staple"})
        assert "Secure" in response.headers["set-cookie"].split("; ")
    server.stop()


def test_a_certificate_that_cannot_be_used_is_named(watch: Any, tmp_path: Path) -> None:
    certificate, _ = write_certificate(tmp_path)
    for name in (certificate, tmp_path / "missing.pem"):
        with pytest.raises(UsageError, match=f"{name.name}.*cannot be used"):
            WebServer(watch.make_app(), certificate=name).start()


def test_a_failed_start_leaves_the_port_free(watch: Any, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UsageError):
        WebServer(watch.make_app(), port=port, certificate=tmp_path / "missing.pem").start()
    server = WebServer(watch.make_app(), port=port)
    server.start()
    server.stop()


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_is_not_installed_is_named(module: str) -> None:
    script = (
        f"import sys; sys.modules['{module}'] = None\n"
        "from meliad_edge.errors import MissingExtraError\n"
        "try:\n    import meliad_edge.monitor.web.server\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(MissingExtraError(module.replace("_", "-"), "monitor"))
