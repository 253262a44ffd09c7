"""Flashing over a real SSH server on this machine, one folder of meliad-edge per device."""

from __future__ import annotations

import asyncio
import base64
import datetime
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from meliad_edge.bundle import Part, Signed, pack, read_parts
from meliad_edge.device.flash import STEPS
from meliad_edge.device.slots import Home
from meliad_edge.device.ssh import Address, connect
from meliad_edge.errors import DeviceError
from meliad_edge.signing import load_key, make_key

pytestmark = pytest.mark.workshop


@pytest.fixture(scope="module")
def device(make_device: Any) -> Any:
    """A device that has never been flashed when the first test of this file takes it."""
    return make_device()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.05)


def version_of(home: Home) -> int | None:
    current = home.current()
    slot = None if current is None else home.read_slot(current)
    return None if slot is None else slot.version


def confirmed(home: Home) -> int | None:
    """Version of the model that has passed its probation."""
    return None if home.read_trial() is not None else version_of(home)


def test_a_device_that_was_never_flashed_says_so(device: Any, at_workshop: Any, invoke: Any) -> None:
    for verb in ("status", "rollback", "logs"):
        outcome = invoke(verb, device.name)
        assert outcome.code == 11
        assert outcome.error_line.startswith(f"{device.name}: meliad-edge is not on this device; run: ")


def test_without_a_trusted_key_nothing_is_taken(device: Any, flash: Any, make_bundle: Any) -> None:
    outcome = flash(device, make_bundle(1))
    assert outcome.code == 5
    assert outcome.error_line == (
        f"{device.name}: this device trusts no key yet, so it takes no model; hand it one with: --trust NAME.pub"
    )
    assert device.running() is None


def test_first_contact_reports_every_step(device: Any, flash: Any, make_bundle: Any, workshop: Any) -> None:
    bundle = make_bundle(1)
    outcome = flash(device, bundle, "--trust", workshop.public_key)
    assert outcome.code == 0, outcome.err
    assert outcome.json["outcome"] == "installed"
    assert [step["name"] for step in outcome.json["steps"]] == list(STEPS)
    assert all(f"{number}/12 {name}" in outcome.err for number, name in enumerate(STEPS, 1))
    parts = {step["name"]: step["sent_bytes"] for step in outcome.json["steps"]}
    manifest, _, _ = read_parts(bundle)
    assert parts["parts"] == sum({part.sha256: part.bytes for part in manifest.parts.values()}.values())
    assert outcome.json["sent_bytes"] == sum(parts.values())
    assert outcome.json["seconds"] >= sum(step["seconds"] for step in outcome.json["steps"]) * 0.99
    assert device.running() == ("metal", 1)


def test_the_same_bundle_again_is_left_alone(device: Any, flash: Any, make_bundle: Any) -> None:
    before = (device.home.folder / "current").lstat().st_mtime_ns
    outcome = flash(device, make_bundle(1))
    assert (outcome.code, outcome.json["outcome"]) == (0, "unchanged")
    assert outcome.json["sent_bytes"] < 50_000  # the question itself
    assert (device.home.folder / "current").lstat().st_mtime_ns == before


def test_only_changed_parts_travel(device: Any, flash: Any, make_bundle: Any) -> None:
    outcome = flash(device, make_bundle(2))
    assert outcome.code == 0, outcome.err
    assert {step["name"]: step["sent_bytes"] for step in outcome.json["steps"]}["parts"] == 0
    assert device.running() == ("metal", 2)


def test_status_and_rollback(device: Any, at_workshop: Any, invoke: Any) -> None:
    status = invoke("status", device.name, "--json").json
    assert status["slots"][status["current"]]["version"] == 2
    assert status["service"]["slot"] == status["current"]
    assert invoke("rollback", device.name, "--json").json["slot"]["version"] == 1
    assert device.running() == ("metal", 1)
    wait_until(lambda: (invoke("status", device.name, "--json").json["service"] or {}).get("slot") != status["current"])
    assert "metal" in invoke("status", device.name).out
    assert invoke("rollback", device.name, "--json").json["slot"]["version"] == 2


def test_an_older_model_is_refused_unless_asked_for(device: Any, flash: Any, make_bundle: Any) -> None:
    outcome = flash(device, make_bundle(1))
    assert outcome.code == 11
    assert outcome.error_line == (
        f"{device.name}: version 1 is older than version 2, which runs; to go back anyway: --allow-downgrade"
    )
    assert flash(device, make_bundle(1), "--allow-downgrade").code == 0
    assert device.running() == ("metal", 1)


def test_a_video_is_watched_and_its_events_are_in_the_logs(
    device: Any, flash: Any, make_bundle: Any, video: Path, at_workshop: Any, invoke: Any
) -> None:
    outcome = flash(device, make_bundle(3), "--source", video)
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in invoke("logs", device.name).out.splitlines() if line.startswith("{")]
    assert [line for line in lines if line.get("type") == "summary"][-1]["frames"]["scored"] == 24
    assert (device.home.folder / "events" / "events.jsonl").is_file()
    assert invoke("logs", device.name, "--lines", 1, "--json").json["lines"] != []
    assert invoke("status", device.name, "--json").json["slots"][device.home.current()]["sources"] == [str(video)]


class Receiver(http.server.BaseHTTPRequestHandler):
    """A receiver of webhooks that keeps what it gets."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((dict(self.headers), json.loads(body)))  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.received = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask_page(port: int, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/v1/cameras", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5.0) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def test_a_device_watches_what_a_file_says(
    make_device: Any,
    flash: Any,
    make_bundle: Any,
    workshop: Any,
    texture_set: Path,
    tmp_path: Path,
    receiver: Any,
    at_workshop: Any,
    invoke: Any,
) -> None:
    device = make_device()
    inbox, plant, port, token = tmp_path / "inbox", tmp_path / "plant", free_port(), "T0KEN-of-this-line"
    inbox.mkdir()
    plant.mkdir()
    secret = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    (plant / "token").write_text(token)
    (plant / "secret").write_text(secret)
    cv2.imwrite(str(plant / "mask.png"), np.zeros((128, 128), np.uint8))
    config = plant / "line.toml"
    config.write_text(
        f"""
        out = ["events", "http://127.0.0.1:{receiver.server_port}/hook"]
        webhook_secret_file = "secret"
        serve = "127.0.0.1:{port}"
        token_file = "token"
        [[camera]]
        source = "{inbox}"
        name = "line 3"
        window = "1/1"
        follow = true
        mask = "mask.png"
        """
    )
    outcome = flash(device, make_bundle(1), "--trust", workshop.public_key, "--config", config)
    assert outcome.code == 0, outcome.err
    wait_until(lambda: ask_page(port, token) == 200)
    assert ask_page(port, None) == 401
    shutil.copy(texture_set / "test" / "scratch" / "000.png", inbox)
    wait_until(lambda: receiver.received)
    headers, event = receiver.received[0]
    assert (event["source"], event["kind"]) == ("000.png", "anomaly")
    assert "webhook-signature" in {name.lower() for name in headers}
    assert (device.home.folder / "events" / "events.sqlite").is_file()

    status = invoke("status", device.name, "--json")
    slot = status.json["slots"][device.home.current()]
    assert (slot["sources"], slot["page"]) == ([str(inbox)], f"127.0.0.1:{port}")
    assert token not in status.out and secret not in status.out and secret not in outcome.err
    private = [*device.home.slot_folder(device.home.current()).glob("watch/*")]
    assert len(private) == 3 and all(path.stat().st_mode & 0o077 == 0 for path in private)
    assert not list(device.home.folder.glob("incoming/*"))

    # The same again is left alone; a new model goes on watching; other settings with the same model keep its threshold.
    assert flash(device, make_bundle(1), "--config", config).json["outcome"] == "unchanged"
    assert flash(device, make_bundle(2)).code == 0
    wait_until(lambda: ask_page(port, token) == 200)
    model = device.home.slot_folder(device.home.current()) / "model.meliad"
    assert invoke("threshold", model, "--false-alarm-rate", "0.1").code == 0
    config.write_text(config.read_text().replace('mask = "mask.png"', "tiles = [1, 1]"))
    assert flash(device, make_bundle(2), "--config", config).json["outcome"] == "installed"
    folder = device.home.slot_folder(device.home.current())
    assert (folder / "model.threshold.json").is_file()
    assert len(list(folder.glob("watch/*"))) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('serve = "80x"', "--serve 80x: expected [HOST:]PORT"),
        ('serve = "8080"\ntoken_file = "none"', "cannot be read (No such file or directory)"),
        ('out = ["https://mes.local/hooks"]', "requests are signed; set MELIAD_EDGE_WEBHOOK_SECRET"),
        ('tls_cert = "none.pem"', "none.pem: cannot be read (No such file or directory); the device needs it"),
        ("speed = 3", "unknown key 'speed'; the file has camera, camera_secrets, out,"),
    ],
)
def test_what_a_device_cannot_watch_is_refused_before_anything_is_sent(
    flash: Any, device: Any, make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.setenv("MELIAD_EDGE_WEBHOOK_SECRET", "whsec_of_the_workshop_does_not_travel")
    config = tmp_path / "line.toml"
    config.write_text(f'{text}\n[[camera]]\nsource = "rtsp://cam/x"\n')
    before = device.running()
    outcome = flash(device, make_bundle(9), "--config", config)
    assert outcome.code == 2
    assert said in outcome.error_line
    assert "connect" not in outcome.err
    assert device.running() == before


def test_a_watch_that_fails_on_probation_goes_back(
    device: Any, flash: Any, make_bundle: Any, tmp_path: Path, at_workshop: Any, invoke: Any
) -> None:
    outcome = flash(device, make_bundle(4), "--source", tmp_path / "none.mp4", "--probation", 30)
    assert outcome.code == 11
    assert "gave up the new model: watch failed 3 times on probation, last with exit code 7: " in outcome.error_line
    assert device.running() == ("metal", 3)
    assert "version 4 was given up: watch failed 3 times" in invoke("status", device.name).err
    outcome = flash(device, make_bundle(4), "--source", "rtsp://no..camera/live", "--probation", 30)
    assert outcome.code == 11
    assert "last with exit code 7: rtsp://no..camera/live: the address is not valid" in outcome.error_line
    assert device.running() == ("metal", 3)


def test_a_missed_budget_is_refused(device: Any, flash: Any, make_bundle: Any) -> None:
    outcome = flash(device, make_bundle(5, latency_budget_ms=0.001))
    assert outcome.code == 11
    assert "too slow here: p95 " in outcome.error_line
    assert "the budget is 0.001 ms" in outcome.error_line
    assert device.running() == ("metal", 3)
    assert flash(device, make_bundle(5, latency_budget_ms=60_000)).code == 0


def test_a_model_that_decides_otherwise_is_refused(device: Any, flash: Any, make_bundle: Any, workshop: Any) -> None:
    path = make_bundle(6)
    manifest, _, parts = read_parts(path)
    golden = json.loads(parts["golden.json"])
    for frame in golden:
        frame["score"] = -frame["score"]
    parts["golden.json"] = json.dumps(golden).encode()
    digest = Part(sha256=sha256(parts["golden.json"]).hexdigest(), bytes=len(parts["golden.json"]))
    manifest = manifest.model_copy(update={"parts": {**manifest.parts, "golden.json": digest}})
    described = manifest.model_dump_json().encode()
    key = load_key("line3", workshop.keys, datetime.date.today())
    pack(path, Signed(described, key.sign(described)), parts)
    outcome = flash(device, path)
    assert outcome.code == 6
    assert "does not decide as the trained model" in outcome.error_line
    assert device.running() == ("metal", 5)


def test_what_is_not_signed_as_it_must_be_is_refused(
    device: Any, flash: Any, make_bundle: Any, workshop: Any, tmp_path: Path
) -> None:
    today = datetime.date.today()
    stranger = make_key("stranger", None, tmp_path)
    late = make_key("late", today + datetime.timedelta(days=1), tmp_path)
    outcome = flash(device, make_bundle(7, sign=None))
    assert (outcome.code, "the bundle is not signed" in outcome.error_line) == (5, True)
    outcome = flash(device, make_bundle(7, sign=stranger.sign))
    assert (outcome.code, "no trusted key made the signature; trusted are line3" in outcome.error_line) == (5, True)
    # Its last day was yesterday: the key that the device is handed says so.
    expired = tmp_path / "late.pub"
    expired.write_text(late.public.to_line().replace(f"{late.public.expires}", f"{today - datetime.timedelta(days=1)}"))
    outcome = flash(device, make_bundle(7, sign=late.sign), "--trust", expired)
    assert outcome.code == 5
    assert "is signed with key late" in outcome.error_line and "expired on" in outcome.error_line
    assert device.running() == ("metal", 5)


def test_a_tampered_bundle_never_leaves_the_workshop(device: Any, flash: Any, make_bundle: Any, tmp_path: Path) -> None:
    _, signed, parts = read_parts(make_bundle(7))
    pack(tmp_path / "tampered.meliad", signed, parts | {"calibration.json": parts["calibration.json"] + b" "})
    outcome = flash(device, tmp_path / "tampered.meliad")
    assert outcome.code == 5
    assert "does not match its SHA-256" in outcome.error_line


def test_a_part_that_is_tampered_with_on_the_device_is_refused_there(device: Any, flash: Any, make_bundle: Any) -> None:
    bundle = make_bundle(7)
    manifest, _, _ = read_parts(bundle)
    # Somebody who may write there puts another graph in the place of one that did not arrive yet.
    planted = device.home.folder / "incoming" / manifest.parts["model.fp32.onnx"].sha256
    planted.write_bytes(b"another graph")
    outcome = flash(device, bundle)
    assert outcome.code == 5
    assert "model.fp32.onnx does not match its SHA-256" in outcome.error_line
    assert device.running() == ("metal", 5)
    planted.unlink()


def test_two_flashes_at_once_one_wins(device: Any, make_bundle: Any, workshop: Any) -> None:
    bundles = [make_bundle(8), make_bundle(8, latency_budget_ms=1e6)]
    options = ("--python", sys.executable, "--installed", "--probation", 2)
    both = [workshop.start("flash", device.name, bundle, *options) for bundle in bundles]
    errors = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 11], errors
    loser = errors[codes.index(11)].splitlines()[-1]
    assert "another flash or rollback is under way" in loser
    assert device.running() == ("metal", 8)
    assert confirmed(device.home) == 8


def test_a_full_disk_changes_nothing(make_device: Any, flash: Any, make_bundle: Any, workshop: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    device = make_device("full")
    device.home.folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", device.home.folder], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("this machine cannot mount a small disk")
    try:
        outcome = flash(device, make_bundle(1), "--trust", workshop.public_key)
        assert outcome.code == 11
        assert "MB are free, " in outcome.error_line
        assert device.running() is None
    finally:
        device.cut_power()
        subprocess.run(["umount", "--lazy", device.home.folder], check=True)


def test_the_disk_fills_up_on_the_way(make_device: Any, make_bundle: Any, workshop: Any, at_workshop: Any) -> None:
    """Past the estimate, the write itself fails: the part that did not fit is gone, and said."""
    if not Path("/dev/full").exists() or os.geteuid() != 0:
        pytest.skip("needs root and a small disk")
    device = make_device("filling")
    device.home.folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", device.home.folder]).returncode != 0:
        pytest.skip("this machine cannot mount a small disk")

    async def send() -> None:
        async with connect(Address.parse(device.name)) as link:
            data = b"x" * (4 << 20)
            await link.send({sha256(data).hexdigest(): data}, str(device.home.folder))

    try:
        with pytest.raises(DeviceError, match=r"/home cannot be written \(No space left on device\)"):
            asyncio.run(send())
        assert list(device.home.folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", device.home.folder], check=True)


def test_without_python_nothing_begins(device: Any, at_workshop: Any, invoke: Any, make_bundle: Any) -> None:
    outcome = invoke("flash", device.name, make_bundle(9), "--python", "/no/python3")
    assert outcome.code == 11
    assert outcome.error_line.endswith("Python 3.10 or newer is needed there: sudo apt install python3")


def test_another_kind_of_processor_is_refused(
    device: Any, at_workshop: Any, invoke: Any, make_bundle: Any, tmp_path: Path
) -> None:
    """The kernel calls itself 32-bit to programs under setarch."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec setarch i686 {sys.executable} "$@"\n')
    python.chmod(0o755)
    before = sorted(device.home.folder.glob("runtimes/*"))
    outcome = invoke("flash", device.name, make_bundle(9), "--python", python)
    assert outcome.code == 11
    assert "on i686 with glibc" in outcome.error_line
    assert outcome.error_line.endswith("there is no ONNX Runtime for this processor; aarch64 or x86_64 is needed")
    assert sorted(device.home.folder.glob("runtimes/*")) == before


def test_a_runtime_that_does_not_start_is_named(make_device: Any, flash: Any, make_bundle: Any) -> None:
    bare = make_device("bare", PYTHONPATH="/nowhere")
    outcome = flash(bare, make_bundle(9), "--python", "/usr/bin/python3")
    assert outcome.code == 11
    assert "meliad-edge does not start with /usr/bin/python3" in outcome.error_line


def test_an_unknown_host_key_is_never_accepted(
    device: Any, flash: Any, make_bundle: Any, make_device: Any, workshop: Any
) -> None:
    known = workshop.known_hosts.read_text()
    lines = {line.split()[0]: line for line in known.splitlines()}
    other = make_device("other")
    try:
        place = f"[127.0.0.1]:{device.port}"
        for entries in ("", f"{place} {(other.folder / 'host_key.pub').read_text()}"):
            workshop.known_hosts.write_text(entries)
            outcome = flash(device, make_bundle(9))
            assert outcome.code == 11
            assert "its host key is not the one that is known, or none is known" in outcome.error_line
            assert "ssh-keyscan" in outcome.error_line
        assert place in lines
    finally:
        workshop.known_hosts.write_text(known)


def test_who_is_not_let_in_is_told(device: Any, flash: Any, make_bundle: Any, workshop: Any, tmp_path: Path) -> None:
    key = workshop.home / ".ssh" / "id_ed25519"
    shutil.move(key, tmp_path / "kept")
    try:
        outcome = flash(device, make_bundle(9))
    finally:
        shutil.move(tmp_path / "kept", key)
    assert outcome.code == 11
    assert "our keys do not let us in" in outcome.error_line


def test_nobody_there(at_workshop: Any, invoke: Any, make_bundle: Any) -> None:
    outcome = invoke("flash", "127.0.0.1:1", make_bundle(9))
    assert outcome.code == 11
    assert outcome.error_line.startswith("127.0.0.1:1: cannot be reached (")


@pytest.mark.parametrize("way", ["cut", "silent"])
def test_a_lost_link_is_survived(way: str, device: Any, make_bundle: Any, workshop: Any) -> None:
    version = {"cut": 9, "silent": 10}[way]
    options = ("--python", sys.executable, "--installed", "--probation", 2, "--trust", workshop.public_key)
    process = workshop.start("flash", device.name, make_bundle(version), *options)
    for line in process.stderr:
        if "7/12 verify" in line:
            break
    if way == "cut":
        device.cut_links()
        error = process.communicate()[1].splitlines()[-1]
    else:
        with device.silent_links():
            error = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 11
    assert error == (
        f"meliad-edge: {device.name}: the link was lost; what runs there goes on, ask it with: meliad-edge status "
        f"{device.name}"
    )
    wait_until(lambda: confirmed(device.home) == version)
    assert device.running() == ("metal", version)


@pytest.mark.parametrize("side", ["workshop", "device"])
def test_kill_9_at_every_step_leaves_a_working_device(
    side: str, make_device: Any, flash: Any, make_bundle: Any, workshop: Any
) -> None:
    """One device, one new version per step; either side is killed when the step before has just ended."""
    device = make_device("killed")
    assert flash(device, make_bundle(1), "--trust", workshop.public_key).code == 0
    before = 1
    for number, step in enumerate(STEPS, 1):
        version = before + 1
        process = workshop.start(
            "flash", device.name, make_bundle(version), "--python", sys.executable, "--installed", "--probation", 1
        )
        for line in process.stderr:
            if f"{number}/12 {step}" in line:
                break
        if side == "workshop":
            process.kill()
            process.communicate()
            # From its own steps on the device goes on; before, nothing has begun.
            if step in STEPS[STEPS.index("verify") :]:
                wait_until(lambda expected=version: confirmed(device.home) == expected)
        else:
            device.cut_power()
            error = process.communicate()[1].splitlines()[-1]
            assert process.returncode == 11 or step == "probation", error
            device.boot()
            wait_until(lambda: device.home.is_locked("service.lock") and device.home.read_trial() is None)
        assert device.running() in {("metal", before), ("metal", version)}, step
        if side == "device":
            # What was not confirmed never runs after a power cut; its probation may just have ended.
            assert device.running() == ("metal", before) or step == "probation", step
        before = confirmed(device.home)
    outcome = flash(device, make_bundle(99))
    assert outcome.code == 0, outcome.err
    assert device.running() == ("metal", 99)
