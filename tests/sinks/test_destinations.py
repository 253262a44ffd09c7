from __future__ import annotations

import sys
from pathlib import Path

import pytest

from meliad_edge.errors import MissingExtraError, UsageError
from meliad_edge.sinks.destinations import (
    MqttAddress,
    WebhookAddress,
    open_destination,
    parse_destination,
    parse_folder,
)
from meliad_edge.stream.credentials import Credentials

SECRET = "0123456789abcdef"
WITH_SECRET = {"MELIAD_EDGE_WEBHOOK_SECRET": SECRET}


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("out", "out"),
        ("/var/lib/meliad", "/var/lib/meliad"),
        ("file:///var/my%20runs", "/var/my runs"),
        ("file://localhost/var/runs", "/var/runs"),
        ("FILE:///var/runs", "/var/runs"),
        ("C:\\runs", "C:\\runs"),
    ],
)
def test_folders(text: str, folder: str) -> None:
    assert parse_destination(text, environment={}) == Path(folder)
    assert parse_folder(text) == Path(folder)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("mqtt://broker", MqttAddress("broker", 1883, False, "meliad")),
        ("mqtts://broker/", MqttAddress("broker", 8883, True, "meliad")),
        ("MQTTS://Broker:9000/plant%202/line/", MqttAddress("broker", 9000, True, "plant 2/line")),
        ("mqtt://[fd00::1]:1884/a", MqttAddress("fd00::1", 1884, False, "a")),
        ("mqtts://me:p%40ss%2F@broker", MqttAddress("broker", 8883, True, "meliad", Credentials("me", "p@ss/"))),
        ("mqtts://me@broker", MqttAddress("broker", 8883, True, "meliad", Credentials("me", ""))),
    ],
)
def test_brokers(text: str, address: MqttAddress) -> None:
    assert parse_destination(text, environment={}) == address


def test_the_name_of_a_broker_is_its_address_without_credentials() -> None:
    address = parse_destination("mqtts://me:S3CR3T@[fd00::1]/plant/line", environment={})
    assert isinstance(address, MqttAddress)
    assert address.name == "mqtts://[fd00::1]:8883/plant/line"
    assert "S3CR3T" not in repr(address)


def test_credentials_of_a_broker_come_from_the_environment_where_the_address_has_none(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("from file\n")
    both = {"MELIAD_EDGE_MQTT_USER": "you", "MELIAD_EDGE_MQTT_PASSWORD": "from variable"}
    file = {"MELIAD_EDGE_MQTT_USER": "you", "MELIAD_EDGE_MQTT_PASSWORD_FILE": str(tmp_path / "password")}
    for text, environment, expected in (
        ("mqtts://broker", both, Credentials("you", "from variable")),
        ("mqtts://broker", file, Credentials("you", "from file")),
        ("mqtts://me@broker", file, Credentials("me", "from file")),
        ("mqtts://me:mine@broker", both, Credentials("me", "mine")),
        ("mqtts://broker", {}, None),
    ):
        address = parse_destination(text, environment=environment)
        assert isinstance(address, MqttAddress)
        assert address.credentials == expected


def test_webhooks_and_their_secret(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    url = "https://me:S3CR3T@example.com:8443/hook?line=1"
    for environment in (WITH_SECRET, {"MELIAD_EDGE_WEBHOOK_SECRET_FILE": str(tmp_path / "secret")}):
        address = parse_destination(url, environment=environment)
        assert address == WebhookAddress(url, SECRET)
        assert SECRET not in repr(address)
        assert "S3CR3T" not in repr(address)


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("", {}, "not a destination; give a folder, file:///PATH, https://HOST/PATH"),
        ("file://", {}, "not a destination"),
        ("rtsp://me:S3CR3T@camera/live", {}, "--out rtsp://camera/live: not a destination"),
        ("mqtt://me:S3CR3T@/prefix", {}, "no host"),
        ("mqtt://me:S3CR3T@broker:port", {}, "cannot be read; write '/', '\\?'"),
        ("mqtt://me:S3CR3T@broker:99999", {}, "cannot be read"),
        ("mqtt://me:1/S3CR3T@broker", {}, "cannot be read; write '/', '\\?', '#' and '@' as %2F"),
        ("mqtt://me:1#S3CR3T@broker", {}, "cannot be read"),
        ("mqtt://me:S3CR3T@broker/a#b", {}, r"expected mqtt://HOST\[:PORT\]\[/PREFIX\]"),
        ("mqtt://broker/a?b=1", {}, "expected mqtt://HOST"),
        ("mqtt://broker/%23", {}, "topics cannot begin with '#'"),
        ("mqtt://broker/a/+/b", {}, "topics cannot begin with"),
        ("mqtt://broker/$SYS", {}, "topics cannot begin with"),
        ("mqtt://broker/a//b", {}, "topics cannot begin with"),
        ("mqtt://bro ker/a", {}, "no host that could be asked"),
        ("mqtt://broker", {"MELIAD_EDGE_MQTT_PASSWORD": "S3CR3T"}, "a password without a user; set MELIAD_EDGE_MQTT"),
        ("https://", WITH_SECRET, "no host"),
        ("https://me:1/S3CR3T@example.com", WITH_SECRET, "cannot be read"),
        ("https://me:S3CR3T@example.com/p4th", {}, "--out https://example.com: requests are signed; set MELIAD_EDGE_W"),
    ],
)
def test_what_is_no_destination_is_refused_without_its_secrets(
    text: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_destination(text, environment=environment)
    assert "S3CR3T" not in str(caught.value)
    assert "p4th" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_file_that_holds_no_secret_is_refused(tmp_path: Path) -> None:
    variable = "MELIAD_EDGE_WEBHOOK_SECRET_FILE"
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, reason in (
        ("missing", r"cannot be read \(No such file or directory\)"),
        ("empty", "is empty"),
        ("binary", r"cannot be read \(not text\)"),
    ):
        with pytest.raises(UsageError, match=f"{variable}: {tmp_path / name} {reason}"):
            parse_destination("https://example.com", environment={variable: str(tmp_path / name)})


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("http://example.com/p4th", "http://example.com: events travel in the clear"),
        ("http://10.0.0.7:8123/p4th", "http://10.0.0.7:8123: events travel in the clear"),
        ("http://127.0.0.2/p4th", ""),
        ("http://[::1]:8123/p4th", ""),
        ("http://localhost/p4th", ""),
        ("https://example.com/p4th", ""),
        ("mqtt://me:S3CR3T@broker", "mqtt://broker: the password travels in the clear"),
        ("mqtt://me:S3CR3T@localhost", ""),
        ("mqtt://broker", ""),
        ("mqtts://me:S3CR3T@broker", ""),
    ],
)
def test_what_travels_in_the_clear_is_said(text: str, warning: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_destination(text, environment=WITH_SECRET)
    assert len(caplog.records) == bool(warning)
    assert warning in caplog.text
    assert "S3CR3T" not in caplog.text
    assert "p4th" not in caplog.text


def test_a_network_address_is_no_folder() -> None:
    with pytest.raises(UsageError, match="give a folder, as a path or file:///PATH") as caught:
        parse_folder("mqtt://me:S3CR3T@broker")
    assert "S3CR3T" not in str(caught.value)


def test_a_broker_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    monkeypatch.delitem(sys.modules, "meliad_edge.sinks.mqtt", raising=False)
    with pytest.raises(
        MissingExtraError, match=r"paho-mqtt is not installed; run: pip install 'meliad-edge\[monitor\]'"
    ):
        open_destination(MqttAddress("broker", 1883, False, "meliad"), [])


def test_a_webhook_needs_no_package_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho", None)
    destination = open_destination(WebhookAddress("https://example.com/p4th", SECRET), [])
    assert destination.name.startswith("https://example.com#")
