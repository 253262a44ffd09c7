"""What a device does before meliad-edge is on it: sent over SSH to the device's own ``python3 -``.

The standard library alone, and no syntax newer than Python 3.7, so that an older one can say that it is too old.
Wheels are unpacked into a folder each, named after its SHA-256: two runtimes share what they have in common, and only
wheels that changed travel. A runtime is a shell script that starts Python with those folders on its path.
"""

from __future__ import annotations

import grp
import hashlib
import json
import os
import platform
import pwd
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

UNIT = """\
[Unit]
Description=meliad-edge: watches its cameras with the model of the current slot
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={home}/serve
Restart=always
RestartSec=2
User={user}
SupplementaryGroups={groups}
UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths={home}
ProtectHome={protect_home}
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
CapabilityBoundingSet=
AmbientCapabilities=
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""

SERVE = """\
#!/bin/sh
# Keeps the watch service of meliad-edge running, with the Python of whichever slot is current.
cd {home} || exit 1
exec 9>serve.lock
flock --nonblock 9 || exit 0
while :; do
    {{ [ -x current/python ] && current/python -m meliad_edge.device run; }} 9>&- || sleep 1 9>&-
done
"""

_SERVICE_USER = "meliad-edge"
_UNIT_FILE = Path("/etc/systemd/system/meliad-edge.service")


def home_folder() -> Path:
    """Where meliad-edge is on this machine: ``MELIAD_EDGE_HOME``, else /opt for root and a folder of the user's own."""
    named = os.environ.get("MELIAD_EDGE_HOME")
    if named:
        return Path(named)
    return Path("/opt/meliad-edge") if os.geteuid() == 0 else Path.home() / ".local" / "share" / "meliad-edge"


def prepare(home: Path) -> dict[str, object]:
    """Make the folder, and say what the machine is and has."""
    (home / "incoming").mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0 and _has_systemd():
        _own(home)
    return {
        "home": str(home),
        "python": list(sys.version_info[:2]),
        "executable": sys.executable,
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "free_bytes": shutil.disk_usage(str(home)).free,
        "wheels": _names(home / "wheels"),
        "incoming": _names(home / "incoming"),
    }


def make_runtime(home: Path, wheels: list[str], interpreter: str) -> dict[str, object]:
    """Unpack the wheels that were sent and write what starts Python with them.

    Args:
        home: The folder of meliad-edge.
        wheels: SHA-256 of each wheel; none where that Python has meliad-edge already.
        interpreter: The Python to start.
    """
    for sha256 in wheels:
        _unpack_wheel(home, sha256)
    path = ":".join(str(home / "wheels" / sha256) for sha256 in wheels)
    lines = [
        "#!/bin/sh",
        f"export MELIAD_EDGE_HOME='{home}' MELIAD_EDGE_KEYS='{home}/keys'",
        *([f"export PYTHONNOUSERSITE=1 PYTHONPATH='{path}'"] if wheels else []),
        f"exec '{interpreter}' \"$@\"",
    ]
    script = "\n".join(lines) + "\n"
    identity = hashlib.sha256(script.encode()).hexdigest()[:16]
    folder = home / "runtimes" / identity
    launcher, untried = folder / "python", folder / f"untried-{os.getpid()}"
    if wheels and launcher.exists():
        return {"runtime": identity, "version": (folder / "version").read_text()}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "wheels.json", json.dumps(wheels), 0o644)
    _write(untried, script, 0o755)
    check = [str(untried), "-c", "import meliad_edge.runtime.load as _, meliad_edge as m; print(m.__version__)"]
    done = subprocess.run(check, capture_output=True, text=True)
    if done.returncode != 0:
        untried.unlink()
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"meliad-edge does not start with {interpreter}: {reason}")
    version = done.stdout.strip()
    _write(folder / "version", version, 0o644)
    untried.replace(launcher)
    _hand_over(home, folder.parent)
    return {"runtime": identity, "version": version}


def start_service(home: Path) -> dict[str, object]:
    """See that the watch service runs: under systemd where this user may, else as a plain process."""
    _write(home / "serve", SERVE.format(home=f"'{home}'"), 0o755)
    if os.geteuid() == 0 and _has_systemd():
        user = pwd.getpwuid(home.stat().st_uid).pw_name
        _write(_UNIT_FILE, make_unit(home, user), 0o644)
        for command in (["daemon-reload"], ["enable", "--quiet", "--now", "meliad-edge.service"]):
            subprocess.run(["systemctl", *command], check=True)
        return {"service": "systemd", "user": user}
    with (home / "serve.log").open("ab") as log:
        # In a session of its own, so that it outlives this one; a second one ends at once.
        subprocess.Popen(
            [str(home / "serve")], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return {"service": "plain", "user": pwd.getpwuid(os.geteuid()).pw_name}


def make_unit(home: Path, user: str) -> str:
    """The systemd unit of the watch service."""
    cameras_and_gpu = {group.gr_name for group in grp.getgrall()} & {"video", "render"}
    protect_home = "read-only" if str(home).startswith(("/home/", "/root/")) else "yes"
    return UNIT.format(home=home, user=user, groups=" ".join(sorted(cameras_and_gpu)), protect_home=protect_home)


def _unpack_wheel(home: Path, sha256: str) -> None:
    """Unpack one wheel; the folder has its name only when it is complete."""
    target, wheel = home / "wheels" / sha256, home / "incoming" / sha256
    if target.is_dir():
        return
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        wheel.unlink()
        raise RuntimeError(f"wheel {sha256[:12]} was damaged on its way; flash again")
    target.parent.mkdir(exist_ok=True)
    _hand_over(home, target.parent, deep=False)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=str(target.parent)))
    try:
        with zipfile.ZipFile(str(wheel)) as archive:
            archive.extractall(str(partial))
        for data in partial.glob("*.data"):
            for file in [*data.glob("purelib/*"), *data.glob("platlib/*")]:
                file.rename(partial / file.name)
        partial.chmod(0o755)
        _hand_over(home, partial)
        os.sync()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(str(partial), ignore_errors=True)
        raise
    wheel.unlink()


def _own(home: Path) -> None:
    """Give the folder to a user without rights, so that only the way in is root's."""
    try:
        entry = pwd.getpwnam(_SERVICE_USER)
    except KeyError:
        options = ["--system", "--home-dir", str(home), "--shell", "/usr/sbin/nologin"]
        subprocess.run(["useradd", *options, _SERVICE_USER], check=True)
        entry = pwd.getpwnam(_SERVICE_USER)
    for folder in (home, home / "incoming"):
        os.chown(str(folder), entry.pw_uid, entry.pw_gid)


def _hand_over(home: Path, folder: Path, deep: bool = True) -> None:
    """Give what root has made to the user that owns the folder of meliad-edge."""
    if os.geteuid() == 0:
        owner = home.stat()
        for path in [folder, *(folder.rglob("*") if deep else ())]:
            os.chown(str(path), owner.st_uid, owner.st_gid, follow_symlinks=False)


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


def _write(path: Path, text: str, mode: int) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")  # two flashes may write it at once
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.chmod(mode)
    partial.replace(path)


def _main() -> None:
    """Do one thing and answer with one JSON object."""
    action, arguments = sys.argv[1], json.loads(sys.argv[2])
    actions: dict[str, Callable[..., dict[str, object]]] = {
        "prepare": prepare,
        "make_runtime": make_runtime,
        "start_service": start_service,
    }
    try:
        answer = actions[action](home_folder(), **arguments)
    except (OSError, RuntimeError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
