"""A device like a Jetson: 64-bit ARM under emulation, reached over SSH through a network that leads nowhere else."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.bundle import release
from meliad_edge.signing import load_key, make_key

ROOT = Path(__file__).parents[2]
USER, UID = "edge", 1000
ADDRESS = {"here": "10.203.117.1", "device": "10.203.117.2"}

pytestmark = pytest.mark.workshop


def run_tool(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@dataclass(frozen=True)
class ArmDevice:
    """An emulated device that can be reached, and the folder of its files on this machine.

    Attributes:
        files: What it has written.
        key: Signs bundles that it trusts.
    """

    files: Path
    key: Any
    public_key: Path
    wheels: Path

    @property
    def home(self) -> Path:
        return self.files / "home" / USER / ".local" / "share" / "meliad-edge"

    def versions(self) -> dict[str, int]:
        slots = self.home.glob("slots/[ab]/slot.json")
        return {path.parent.name: json.loads(path.read_text())["version"] for path in slots}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A network namespace with one cable, to this machine."""
    name, cable = f"meliad{os.getpid()}", f"mel{os.getpid()}"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network of its own needs root and ip; run: scripts/install_test_packages.sh")
    commands = (
        ("netns", "add", name),
        ("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name),
        ("address", "add", f"{ADDRESS['here']}/30", "dev", cable),
        ("link", "set", cable, "up"),
        ("-n", name, "address", "add", f"{ADDRESS['device']}/30", "dev", "eth0"),
        ("-n", name, "link", "set", "eth0", "up"),
        ("-n", name, "link", "set", "lo", "up"),
    )
    try:
        for command in commands:
            done = run_tool("ip", *command)
            if done.returncode != 0:
                pytest.skip(f"this machine cannot make a network of its own: {done.stderr.strip()}")
        yield name
    finally:
        run_tool("ip", "netns", "delete", name)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder to flash from, with keys of its own; every device is an entry of its SSH configuration."""
    home = tmp_path_factory.mktemp("arm-workshop")
    (home / ".ssh").mkdir(mode=0o700)
    run_tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / ".ssh" / "id_ed25519")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MELIAD_EDGE_WHEELS", str(ROOT / ".cache" / "device-wheels"))
        patch.setenv("HOME", str(home))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        make_key("line3", None, home / "keys")
        yield home


@contextmanager
def booted(name: str, port: int, network: str, root: Path, workshop: Path, folder: Path) -> Iterator[Path]:
    """A device as it comes: Python, an SSH server and a user without rights, nothing of what we need.

    Yields:
        The folder of what it writes.
    """
    files = folder / "files"
    login = files / "home" / USER
    (login / ".ssh").mkdir(parents=True, mode=0o700)
    shutil.copy(workshop / ".ssh" / "id_ed25519.pub", login / ".ssh" / "authorized_keys")
    for path in (login, *login.rglob("*")):
        os.chown(path, UID, UID)
    (files / "etc").mkdir()
    accounts = (root / "etc" / "passwd").read_text()
    (files / "etc" / "passwd").write_text(f"{accounts}{USER}:*:{UID}:{UID}::/home/{USER}:/bin/sh\n")
    # The root has the dependencies for other tests; this device lacks them: an opaque folder hides those below.
    hidden = files / "usr" / "local" / "lib" / "python3.11" / "dist-packages"
    hidden.mkdir(parents=True)
    os.setxattr(hidden, "trusted.overlay.opaque", b"y")
    run = ROOT / "scripts" / "run_in_aarch64_root.sh"
    options = ("-D", "-e", "-o", "UsePAM=no", "-o", "PidFile=none", "-p", str(port))
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen(
            ["ip", "netns", "exec", network, run, root, folder, "/usr/sbin/sshd", *options],
            stderr=log,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
            start_new_session=True,
        )
    host_key = (root / "etc" / "ssh" / "ssh_host_ed25519_key.pub").read_text().split()
    known, entry = f"[{ADDRESS['device']}]:{port}", f"HostName {ADDRESS['device']}\n  Port {port}\n  User {USER}"
    with (workshop / ".ssh" / "known_hosts").open("a") as file:
        file.write(f"{known if port != 22 else ADDRESS['device']} {host_key[0]} {host_key[1]}\n")
    with (workshop / ".ssh" / "config").open("a") as file:
        file.write(f"Host {name}\n  {entry}\n")
    deadline = time.monotonic() + 60
    try:
        while "Server listening" not in (folder / "sshd.log").read_text():
            assert server.poll() is None and time.monotonic() < deadline, (folder / "sshd.log").read_text()
            time.sleep(0.1)
        yield files
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def device(
    network: str, workshop: Path, aarch64_root: Path, aarch64_wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ArmDevice]:
    folder = tmp_path_factory.mktemp("arm-device")
    with booted("jetson", 22, network, aarch64_root, workshop, folder) as files:
        key = load_key("line3", workshop / "keys", datetime.date.today())
        yield ArmDevice(files, key, workshop / "keys" / "line3.pub", aarch64_wheel.parent)


@pytest.fixture(scope="module")
def releases(device: ArmDevice, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two signed versions of one model."""
    folder = tmp_path_factory.mktemp("arm-releases")
    made = {}
    for version in (1, 2):
        made[version] = Path(shutil.copy(small_bundle, folder / f"{version}.meliad"))
        release(made[version], version=version, sign=device.key.sign)
    return made


def test_doctor_looks_at_a_device_before_its_first_contact(device: ArmDevice, invoke: Any) -> None:
    outcome = invoke("doctor", "jetson", "--json")
    assert outcome.code == 1
    assert "2 required part(s) missing: ONNX Runtime, OpenCV" in outcome.error_line
    facts = {fact["name"]: fact["value"] for fact in outcome.json["facts"]}
    assert facts["system"].endswith(", aarch64")
    assert not device.home.exists()


def test_first_contact_brings_everything(device: ArmDevice, invoke: Any, releases: dict[int, Path]) -> None:
    options = ("--wheels", device.wheels, "--trust", device.public_key, "--probation", 1, "--json")
    outcome = invoke("flash", "jetson", releases[1], *options)
    assert outcome.code == 0, outcome.err
    steps = {step["name"]: step for step in outcome.json["steps"]}
    assert "aarch64" in steps["look"]["text"]
    assert steps["runtime"]["sent_bytes"] > 30_000_000
    assert steps["parity"]["text"].startswith("onnxruntime-cpu+kernel (golden): 8 frames, 0 label flips")
    assert steps["service"]["text"] == f"plain service of user {USER}"
    assert {path.lstat().st_uid for path in device.home.rglob("*")} == {UID}


def test_a_video_is_watched_there(device: ArmDevice, invoke: Any, releases: dict[int, Path], texture_set: Path) -> None:
    """The second flash sends no part of the model and no wheel; its watch scores every frame."""
    import cv2

    video = device.files / "home" / USER / "line.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 12, (128, 128))
    for name in ("good/000", "scratch/000"):
        for _ in range(3):
            writer.write(cv2.imread(str(texture_set / "test" / f"{name}.png")))
    writer.release()
    options = ("--wheels", device.wheels, "--source", f"/home/{USER}/line.avi", "--probation", 120, "--json")
    outcome = invoke("flash", "jetson", releases[2], *options)
    assert outcome.code == 0, outcome.err
    assert outcome.json["sent_bytes"] < 100_000
    lines = [json.loads(line) for line in invoke("logs", "jetson").out.splitlines() if line.startswith("{")]
    summary = next(line for line in lines if line.get("type") == "summary")
    assert summary["frames"]["scored"] == 6


def test_the_same_bundle_again_changes_nothing(device: ArmDevice, invoke: Any, releases: dict[int, Path]) -> None:
    outcome = invoke("flash", "jetson", releases[2], "--wheels", device.wheels, "--json")
    assert (outcome.code, outcome.json["outcome"]) == (0, "unchanged")


def test_a_tampered_bundle_is_refused_there(device: ArmDevice, invoke: Any, releases: dict[int, Path]) -> None:
    stranger = Path(shutil.copy(releases[2], releases[2].with_name("stranger.meliad")))
    release(stranger, version=3, sign=lambda manifest: device.key.sign(manifest + b" "))
    outcome = invoke("flash", "jetson", stranger, "--wheels", device.wheels)
    assert outcome.code == 5
    assert "no trusted key made the signature" in outcome.error_line


def test_rolling_back_there(device: ArmDevice, invoke: Any) -> None:
    assert device.versions() == {"a": 1, "b": 2}
    outcome = invoke("rollback", "jetson", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["slot"]["version"] == 1
    status = invoke("status", "jetson", "--json").json
    assert status["slots"][status["current"]]["version"] == 1


def test_doctor_sees_what_flashing_brought(device: ArmDevice, invoke: Any) -> None:
    outcome = invoke("doctor", "jetson", "--json")
    assert outcome.code == 0, outcome.err
    facts = {fact["name"]: fact for fact in outcome.json["facts"]}
    assert facts["scoring kernel"]["value"].endswith("/libmeliad_ort.so")


@pytest.mark.skipif("MELIAD_EDGE_SLOW_TESTS" not in os.environ, reason="four minutes; set MELIAD_EDGE_SLOW_TESTS=1")
def test_ten_of_them_in_waves(
    network: str,
    workshop: Path,
    aarch64_root: Path,
    device: ArmDevice,
    releases: dict[int, Path],
    invoke: Any,
    tmp_path: Path,
) -> None:
    """Ten devices that have nothing yet, each with a system and an SSH server of its own: a canary, three, then six."""
    inventory, waves = tmp_path / "fleet.toml", [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    with ExitStack() as stack:
        for number, wave in enumerate(waves):
            folder = tmp_path / f"line{number}"
            folder.mkdir()
            stack.enter_context(booted(f"line{number}", 2200 + number, network, aarch64_root, workshop, folder))
            with inventory.open("a") as file:
                file.write(f'[[device]]\nhost = "line{number}"\nwave = {wave}\n')
        options = ("--wheels", device.wheels, "--trust", device.public_key, "--probation", 1, "--json")
        outcome = invoke("flash", inventory, releases[1], *options)
        assert outcome.code == 0, outcome.err
        assert [answer["verdict"] for answer in outcome.json["devices"]] == ["installed"] * 10
        seconds = [answer["seconds"] for answer in outcome.json["devices"]]
        print(f"\nfirst contact of ten emulated devices: {min(seconds):.0f} to {max(seconds):.0f} s each")
