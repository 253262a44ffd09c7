from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.bundle import release
from meliad_edge.device.slots import Home
from meliad_edge.signing import load_key, make_key

ROOT = Path(__file__).parents[2]
KEY = "line3"


def run_tool(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.05)
    return value


@dataclass
class Workshop:
    """Where flashing starts: a home folder with SSH keys, host keys and a configuration of its own.

    Attributes:
        home: The home folder.
        keys: The keys folder, with a signing key.
    """

    home: Path
    keys: Path
    entries: list[str] = field(default_factory=list)

    @property
    def known_hosts(self) -> Path:
        return self.home / ".ssh" / "known_hosts"

    @property
    def public_key(self) -> Path:
        return self.keys / f"{KEY}.pub"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return kept | {"HOME": str(self.home), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def knows(self, name: str, port: int, host_key: Path, address: str = "127.0.0.1") -> None:
        """Note how a device is reached, and its host key, as `ssh` would."""
        user = os.environ.get("USER", "root") if os.geteuid() else "root"
        with (self.home / ".ssh" / "config").open("a") as file:
            file.write(f"Host {name}\n  HostName {address}\n  Port {port}\n  User {user}\n")
        kind, public, *_ = host_key.with_suffix(".pub").read_text().split()
        with self.known_hosts.open("a") as file:
            file.write(f"[{address}]:{port} {kind} {public}\n" if port != 22 else f"{address} {kind} {public}\n")

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Begin a command of ours."""
        program = "from meliad_edge.cli import main; main()"
        command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no OpenSSH on this machine; run: scripts/install_test_packages.sh")
    home = tmp_path_factory.mktemp("workshop")
    (home / ".ssh").mkdir(mode=0o700)
    run_tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / ".ssh" / "id_ed25519")
    made = Workshop(home, home / "keys")
    make_key(KEY, None, made.keys)
    return made


Flash = Callable[..., Any]


@pytest.fixture
def at_workshop(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Commands in this process see the workshop's home folder."""
    monkeypatch.setenv("HOME", str(workshop.home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return workshop


@dataclass
class SshDevice:
    """A device: a real SSH server on this machine, whose sessions have a folder of meliad-edge of their own.

    Attributes:
        name: Its host name for `ssh`.
        folder: Its files.
    """

    name: str
    folder: Path
    port: int
    server: subprocess.Popen[bytes]
    booted: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def home(self) -> Home:
        return Home(self.folder / "home")

    @property
    def environment(self) -> dict[str, str]:
        return {"MELIAD_EDGE_HOME": str(self.home.folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def processes(self) -> list[int]:
        """Everything that runs on it, its SSH server apart."""
        wanted = f"MELIAD_EDGE_HOME={self.home.folder}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:
                continue  # it has ended
        return found

    def cut_power(self) -> None:
        """Everything stops where it is, the sessions of its SSH server too."""
        self.cut_links()
        while pids := self.processes():
            kill(pids)
            time.sleep(0.01)
        while self.booted:
            self.booted.pop().wait()

    def cut_links(self) -> None:
        """The sessions of its SSH server end; what they started goes on."""
        kill(self._sessions())

    @contextlib.contextmanager
    def silent_links(self) -> Iterator[None]:
        """Meanwhile nothing crosses its links, and neither side is told."""
        sessions = self._sessions()
        kill(sessions, signal.SIGSTOP)
        try:
            yield
        finally:
            kill(sessions, signal.SIGCONT)

    def _sessions(self) -> list[int]:
        sessions = children(self.server.pid)
        return [pid for session in sessions for pid in (*children(session), session) if is_sshd(pid)]

    def boot(self) -> None:
        """What systemd or a crontab does after the power came back."""
        serve = self.home.folder / "serve"
        if serve.exists():
            environment = self.environment | {"PATH": os.environ["PATH"]}
            self.booted.append(subprocess.Popen([serve], env=environment, start_new_session=True))

    def running(self) -> tuple[str, int] | None:
        """Name and version of the current model, which must open; None where there is none."""
        from meliad_edge.bundle import open_bundle

        current = self.home.current()
        if current is None:
            return None
        manifest = open_bundle(self.home.slot_folder(current) / "model.meliad").manifest
        return manifest.name, manifest.version


def children(pid: int) -> list[int]:
    try:
        lists = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []  # it has ended
    return [int(child) for listed in lists for child in listed]


def is_sshd(pid: int) -> bool:
    try:
        return "sshd" in Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return False


def kill(pids: list[int], by: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, by)


MakeDevice = Callable[..., SshDevice]


@pytest.fixture(scope="session")
def make_device(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeDevice]:
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if program is None:
        pytest.skip("no SSH server on this machine; run: scripts/install_test_packages.sh")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    made: list[SshDevice] = []

    def make(name: str = "device", **environment: str) -> SshDevice:
        name = f"{name}{len(made)}"
        folder = tmp_path_factory.mktemp(name)
        run_tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key")
        port = free_port()
        device = SshDevice(name, folder, port, subprocess.Popen(["true"]))
        # At this level bash leaves out ~/.bashrc, which is this machine's and not the device's.
        variables = {"SHLVL": "2"} | device.environment | environment
        settings = " ".join(f'"{key}={value}"' for key, value in variables.items())
        configuration = folder / "sshd_config"
        configuration.write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nAuthorizedKeysFile {workshop.home}/.ssh/id_ed25519.pub\nSetEnv {settings}\n"
            "PermitRootLogin yes\nMaxStartups 100\n"
        )
        device.server.wait()
        device.server = subprocess.Popen([program, "-D", "-f", configuration, "-E", folder / "sshd.log"])
        made.append(device)
        workshop.knows(name, port, folder / "host_key")
        wait_until(
            lambda: "Server listening" in (folder / "sshd.log").read_text() if (folder / "sshd.log").exists() else False
        )
        return device

    yield make
    for device in made:
        device.cut_power()
        device.server.kill()
        device.server.wait()


MakeBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def make_bundle(small_bundle: Path, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Releases of one model, signed."""
    folder = tmp_path_factory.mktemp("releases")
    key = load_key(KEY, workshop.keys, datetime.date.today())

    def make(version: int, *, sign: Any = key.sign, latency_budget_ms: float | None = None) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.meliad"
        shutil.copy(small_bundle, path)
        release(path, version=version, latency_budget_ms=latency_budget_ms, sign=sign)
        return path

    return make


@pytest.fixture
def flash(at_workshop: Workshop, invoke: Callable[..., Any]) -> Flash:
    """Flash a device whose Python has meliad-edge."""

    def run(device: SshDevice, bundle: Path, *options: object) -> Any:
        known = ("--python", sys.executable, "--installed", "--probation", "1", "--json")
        return invoke("flash", device.name, bundle, *known, *options)

    return run


@pytest.fixture(scope="session")
def video(texture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good parts and scratched ones, 24 frames."""
    import cv2

    path = tmp_path_factory.mktemp("video") / "line.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 12, (128, 128))
    for name in ("good/000", "scratch/000", "good/001", "scratch/001"):
        for _ in range(6):
            writer.write(cv2.imread(str(texture_set / "test" / f"{name}.png")))
    writer.release()
    return path
