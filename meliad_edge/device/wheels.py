"""The wheels a device needs, found or fetched here: the device itself fetches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from meliad_edge import __version__
from meliad_edge.errors import DeviceError

_OLDEST_PYTHON = (3, 10)
_MACHINES = ("aarch64", "x86_64")
_OLDEST_GLIBC_MINOR = 17


@dataclass(frozen=True, slots=True)
class Platform:
    """What wheels must fit.

    Attributes:
        python: Its version, for example ``(3, 10)``.
        machine: ``"aarch64"`` or ``"x86_64"``.
        glibc: Its version, for example ``"2.35"``.
    """

    python: tuple[int, int]
    machine: str
    glibc: str

    def __str__(self) -> str:
        return f"Python {self.python[0]}.{self.python[1]} on {self.machine} with glibc {self.glibc or 'unknown'}"

    def require_supported(self) -> None:
        """Refuse what no wheels can be found for.

        Raises:
            DeviceError: Python is too old, or the processor is of another kind.
        """
        if self.python < _OLDEST_PYTHON:
            msg = f"{self}: Python 3.10 or newer is needed; on a Jetson flash JetPack 6, else name one with --python"
            raise DeviceError(msg)
        if self.machine not in _MACHINES:
            msg = f"{self}: there is no ONNX Runtime for this processor; {' or '.join(_MACHINES)} is needed"
            raise DeviceError(msg)

    def tags(self) -> list[str]:
        """Platform tags of the wheels that run there, the newest first."""
        major, _, minor = self.glibc.partition(".")
        newest = int(minor) if major == "2" and minor.isdigit() else _OLDEST_GLIBC_MINOR
        many = [f"manylinux_2_{m}_{self.machine}" for m in range(newest, _OLDEST_GLIBC_MINOR - 1, -1)]
        return [*many, f"manylinux2014_{self.machine}", f"linux_{self.machine}"]


def wheel_cache() -> Path:
    """Where fetched wheels are kept: ``MELIAD_EDGE_WHEELS``, else ``~/.cache/meliad-edge/wheels``."""
    return Path(os.environ.get("MELIAD_EDGE_WHEELS") or Path.home() / ".cache" / "meliad-edge" / "wheels")


def find_wheels(platform: Platform, folder: Path | None) -> list[Path]:
    """Our wheel and those it depends on, for a device.

    What is in the folder or was fetched before is taken; only what lacks is fetched.

    Args:
        platform: The device's.
        folder: Wheels at hand, ours for that processor among them.

    Raises:
        DeviceError: The platform is not supported, or a wheel cannot be found.
    """
    platform.require_supported()
    cache = wheel_cache() / f"cp{platform.python[0]}{platform.python[1]}-{platform.machine}-{platform.glibc}"
    cache.mkdir(parents=True, exist_ok=True)
    # A device may be asked to serve a page or to speak MQTT at any time; that extra is two megabytes.
    requirements = [f"meliad-edge[monitor]=={__version__}"]
    if platform.python < (3, 11):
        # pip looks at the marker of this dependency with its own version in mind, not the device's.
        requirements.append("tomli>=2")
    sources = ["--find-links", str(cache), *([] if folder is None else ["--find-links", str(folder)])]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", "{}.{}".format(*platform.python)]
    target += [option for tag in platform.tags() for option in ("--platform", tag)]
    problem = ""
    for reach in (["--no-index"], []):
        with tempfile.TemporaryDirectory(dir=cache) as resolved:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *reach]
            command += [*sources, *target, "--dest", resolved, *requirements]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return [path.replace(cache / path.name) for path in sorted(Path(resolved).glob("*.whl"))]
        problem = next((line for line in done.stderr.splitlines() if line.startswith("ERROR:")), done.stderr.strip())
    msg = (
        f"no wheels for {platform} ({problem.removeprefix('ERROR: ')[:200]}); name a folder that has them, ours too, "
        "with --wheels FOLDER; scripts/build_aarch64_wheel.sh FOLDER makes ours for 64-bit ARM"
    )
    raise DeviceError(msg)
