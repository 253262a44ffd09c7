"""Questions to devices that were flashed before."""

from __future__ import annotations

import asyncio
import io
import shlex
import zipfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from meliad_edge.device.ssh import Address, Link, connect
from meliad_edge.errors import MeliadError

_AT_ONCE = 8

# The Python of the current slot, else that of any runtime; as bootstrap.home_folder() finds the folder.
_WITH_RUNTIME = """\
if [ "$(id -u)" = 0 ]; then home=/opt/meliad-edge; else home=$HOME/.local/share/meliad-edge; fi
home=${{MELIAD_EDGE_HOME:-$home}}
for python in "$home"/current/python "$home"/runtimes/*/python; do
    [ ! -x "$python" ] || exec "$python" {arguments}
done
{otherwise}
"""
_NOTHING_THERE = '{"error": "meliad-edge is not on this device; run: meliad-edge flash HOST MODEL.meliad", "code": 11}'
_PROBE_MODULES = (
    "__init__.py",
    "device/__init__.py",
    "device/probe.py",
    "device/system_files.py",
    "stream/__init__.py",
    "stream/gstreamer.py",
    "stream/picture_format.py",
    "runtime/__init__.py",
    "runtime/kernel_library.py",
)
_PROBE_FROM_ARCHIVE = """\
import dataclasses, json, sys, tempfile
if sys.version_info < (3, 10):
    print(json.dumps({"error": "Python %d.%d is too old, 3.10 is needed" % sys.version_info[:2], "code": 11}))
    sys.exit(11)
with tempfile.NamedTemporaryFile(suffix=".zip") as archive:
    archive.write(sys.stdin.buffer.read())
    archive.flush()
    sys.path.insert(0, archive.name)
    from meliad_edge.device.probe import probe
    print(json.dumps({"facts": [dataclasses.asdict(fact) for fact in probe()]}))
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking one device.

    Attributes:
        address: The device.
        value: What it answered; None where it failed.
        error: Why it failed.
    """

    address: Address
    value: Any = None
    error: MeliadError | None = None


async def read_status(link: Link) -> Any:
    """What runs on a device, see :func:`meliad_edge.device.status.describe`."""
    return await link.ask(_with_runtime("-m meliad_edge.device status"))


async def read_logs(link: Link) -> list[str]:
    """The last lines that its watch wrote."""
    lines: list[str] = (await link.ask(_with_runtime("-m meliad_edge.device logs")))["lines"]
    return lines


async def roll_back(link: Link) -> Any:
    """Let the model before the current one run again.

    Returns:
        What is in the slot that runs then.

    Raises:
        DeviceError: There is none that has passed its probation.
    """
    answer = await link.ask(_with_runtime("-m meliad_edge.device rollback"))
    source = files("meliad_edge.device").joinpath("bootstrap.py").read_bytes()
    await link.ask(_with_runtime("- start_service '{}'"), source)
    return answer["slot"]


async def read_facts(link: Link, python: str) -> list[dict[str, Any]]:
    """What a device is and has; before its first contact the probe travels, and leaves nothing behind.

    Args:
        link: To the device.
        python: Its Python, where meliad-edge has none there yet.
    """
    probe = f"exec {shlex.quote(python)} -c {shlex.quote(_PROBE_FROM_ARCHIVE)}"
    answer = await link.ask(_with_runtime("-m meliad_edge.device doctor", otherwise=probe), _probe_archive())
    facts: list[dict[str, Any]] = answer["facts"]
    return facts


def _probe_archive() -> bytes:
    """The modules that the probe needs, as a ZIP file that Python can import from."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in _PROBE_MODULES:
            archive.writestr(f"meliad_edge/{name}", files("meliad_edge").joinpath(name).read_text(encoding="utf-8"))
    return buffer.getvalue()


def ask_one(address: Address, known_hosts: Path | None, question: Callable[[Link], Awaitable[Any]]) -> Any:
    """Connect to a device and ask it.

    Raises:
        MeliadError: What went wrong there or on the way.
    """

    async def ask() -> Any:
        async with connect(address, known_hosts) as link:
            return await question(link)

    return asyncio.run(ask())


def ask_all(
    addresses: Sequence[Address], known_hosts: Path | None, question: Callable[[Link], Awaitable[Any]]
) -> list[Answer]:
    """Ask several devices at once; one that fails does not stop the others."""
    turns = asyncio.Semaphore(_AT_ONCE)

    async def ask(address: Address) -> Answer:
        try:
            async with turns, connect(address, known_hosts) as link:
                return Answer(address, await question(link))
        except MeliadError as error:
            return Answer(address, error=error)

    async def gather() -> list[Answer]:
        return list(await asyncio.gather(*map(ask, addresses)))

    return asyncio.run(gather())


def _with_runtime(arguments: str, otherwise: str = f"echo {shlex.quote(_NOTHING_THERE)}") -> str:
    return _WITH_RUNTIME.format(arguments=arguments, otherwise=otherwise)
