"""Flashing one device: what it lacks is sent, what it does itself is followed, every step is numbered and timed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from meliad_edge.bundle import Manifest, Signed, read_parts
from meliad_edge.device.ssh import Address, Link, connect
from meliad_edge.device.watch_folder import PackedWatch
from meliad_edge.device.wheels import Platform, find_wheels
from meliad_edge.errors import DeviceError

Say = Callable[[str, str], None]
Outcome = Literal["installed", "unchanged"]

STEPS = (
    "connect",
    "look",
    "runtime",
    "service",
    "plan",
    "parts",
    "verify",
    "engine",
    "parity",
    "latency",
    "switch",
    "probation",
)

# Beside what is sent: the bundle that is put together, unpacked wheels, logs and events.
_SPARE_BYTES = 64 * 1024 * 1024
_UNPACKED_OVER_PACKED = 4


@dataclass(frozen=True, slots=True)
class Parcel:
    """A bundle as it travels.

    Attributes:
        manifest: What it says about itself.
        signed: The bytes of that, and their signature.
        parts: By SHA-256.
    """

    manifest: Manifest
    signed: Signed
    parts: dict[str, bytes]

    @classmethod
    def read(cls, path: Path) -> Parcel:
        """Read a bundle.

        Raises:
            BundleError: It is damaged.
        """
        manifest, signed, parts = read_parts(path)
        return cls(manifest, signed, {manifest.parts[name].sha256: data for name, data in parts.items()})


@dataclass(frozen=True, slots=True)
class FlashSettings:
    """How a device is flashed.

    Attributes:
        watch: What it shall watch; None keeps what it watches.
        window: When scores of sources that only an inventory names make an event.
        probation_s: How long the model must run before it is confirmed.
        allow_downgrade: Whether it may be older than the current one.
        trust: Public key that the device shall trust from now on.
        python: Its Python.
        installed: Whether that Python has meliad-edge already, so that no runtime is sent.
        wheels: Folder with wheels for it.
        known_hosts: File with its host key; None takes ``~/.ssh/known_hosts``.
    """

    watch: PackedWatch | None = None
    window: str = "3/5"
    probation_s: float = 30.0
    allow_downgrade: bool = False
    trust: Path | None = None
    python: str = "python3"
    installed: bool = False
    wheels: Path | None = None
    known_hosts: Path | None = None


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step that ended.

    Attributes:
        name: One of :data:`STEPS`.
        text: What came out.
        seconds: How long it took.
        sent_bytes: What was sent for it.
    """

    name: str
    text: str
    seconds: float
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FlashResult:
    """What flashing one device came to.

    Attributes:
        outcome: ``"unchanged"`` where the device runs this bundle already.
        steps: Every step with its time.
        seconds: All of it.
        sent_bytes: All of it, without what SSH adds.
    """

    outcome: Outcome
    steps: tuple[StepTime, ...]
    seconds: float
    sent_bytes: int


@dataclass(slots=True)
class _Progress:
    """Numbers and times the steps."""

    say: Say
    link: Link | None = None
    steps: list[StepTime] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    begun: float = field(default_factory=time.monotonic)
    counted: int = 0

    def begin(self, name: str) -> None:
        self.begun = time.monotonic()
        self.say(self._label(name), "")

    def end(self, name: str, text: str) -> None:
        sent = 0 if self.link is None else self.link.sent_bytes
        step = StepTime(name, text, time.monotonic() - self.begun, sent - self.counted)
        self.counted = sent
        self.steps.append(step)
        traffic = f", {step.sent_bytes:,} bytes sent" if step.sent_bytes else ""
        self.say(self._label(name), f"{text} ({step.seconds:.1f} s{traffic})")

    def result(self, outcome: Outcome) -> FlashResult:
        return FlashResult(outcome, tuple(self.steps), time.monotonic() - self.start, self.counted)

    @staticmethod
    def _label(name: str) -> str:
        return f"{STEPS.index(name) + 1}/{len(STEPS)} {name}"


async def flash(address: Address, parcel: Parcel, settings: FlashSettings, say: Say) -> FlashResult:
    """Put a bundle into use on a device.

    Args:
        address: The device.
        parcel: The bundle.
        settings: How.
        say: Told of each step as it begins, with an empty text, and as it ends.

    Raises:
        SignatureError: No key that the device trusts signed the bundle.
        ParityError: It does not decide there as where it was made.
        DeviceError: The device cannot be reached, lacks what it needs, or gave the model up.
    """
    progress = _Progress(say)
    progress.begin("connect")
    async with connect(address, settings.known_hosts) as link:
        progress.link = link
        progress.end("connect", "host key known")
        progress.begin("look")
        facts = await bootstrap(link, settings.python, "prepare")
        platform = Platform((facts["python"][0], facts["python"][1]), facts["machine"], facts["glibc"])
        progress.end("look", f"{platform}, {facts['free_bytes'] / 1e9:.1f} GB free")
        progress.begin("runtime")
        runtime, how = await _provide_runtime(link, facts, platform, settings)
        progress.end("runtime", how)
        progress.begin("service")
        service = await bootstrap(link, settings.python, "start_service")
        progress.end("service", f"{service['service']} service of user {service['user']}")
        launcher = f"{facts['home']}/runtimes/{runtime}/python"
        progress.begin("plan")
        if settings.trust is not None:
            await link.ask(_device(launcher, "trust"), _read_key(settings.trust))
        watch = settings.watch
        offer: dict[str, Any] = {
            "manifest": base64.b64encode(parcel.signed.manifest).decode(),
            "signature": base64.b64encode(parcel.signed.signature or b"").decode(),
            "runtime": runtime,
            "watch": None if watch is None else watch.config.model_dump(mode="json"),
            "probation_s": settings.probation_s,
            "allow_downgrade": settings.allow_downgrade,
        }
        plan = await link.ask(_device(launcher, "plan"), json.dumps(offer).encode())
        if plan["unchanged"]:
            progress.end("plan", "runs already, nothing to do")
            return progress.result("unchanged")
        missing = {sha256: parcel.parts[sha256] for sha256 in plan["missing"]}
        progress.end("plan", f"signature good; {len(missing)} of {len(parcel.parts)} parts are missing")
        progress.begin("parts")
        _require_room(
            address, facts["free_bytes"], sum(map(len, missing.values())) + sum(map(len, parcel.parts.values()))
        )
        await link.send(missing, f"{facts['home']}/incoming")
        progress.end("parts", f"{len(missing)} sent")
        files = {} if watch is None else watch.files
        offer["files"] = {sha256: base64.b64encode(data).decode() for sha256, data in files.items()}
        await link.ask(_device(launcher, "install"), json.dumps(offer).encode(), _follower(progress))
        return progress.result("installed")


async def bootstrap(link: Link, python: str, action: str, **arguments: Any) -> Any:
    """Run one action of :mod:`meliad_edge.device.bootstrap` on a device, which needs Python for it and nothing else.

    Raises:
        DeviceError: There is no such Python, or it went wrong.
    """
    source = files("meliad_edge.device").joinpath("bootstrap.py").read_bytes()
    return await link.ask(f"{shlex.quote(python)} - {action} {shlex.quote(json.dumps(arguments))}", source)


def _follower(progress: _Progress) -> Callable[[dict[str, Any]], None]:
    def follow(line: dict[str, Any]) -> None:
        if line["done"]:
            progress.end(line["step"], line["text"])
        else:
            progress.begin(line["step"])

    return follow


async def _provide_runtime(
    link: Link, facts: dict[str, Any], platform: Platform, settings: FlashSettings
) -> tuple[str, str]:
    """The name of a runtime that is on the device then, and how it came there."""
    platform.require_supported()
    if settings.installed:
        made = await bootstrap(link, settings.python, "make_runtime", wheels=[], interpreter=facts["executable"])
        return made["runtime"], f"meliad-edge {made['version']} of {facts['executable']}"
    wheels = [path.read_bytes() for path in await asyncio.to_thread(find_wheels, platform, settings.wheels)]
    named = {hashlib.sha256(data).hexdigest(): data for data in wheels}
    missing = {sha256: data for sha256, data in named.items() if sha256 not in (*facts["wheels"], *facts["incoming"])}
    size = sum(map(len, missing.values()))
    _require_room(link.address, facts["free_bytes"], _UNPACKED_OVER_PACKED * size)
    await link.send(missing, f"{facts['home']}/incoming")
    made = await bootstrap(link, settings.python, "make_runtime", wheels=sorted(named), interpreter=facts["executable"])
    came = f"{len(missing)} of {len(named)} wheels sent" if missing else "there already"
    return made["runtime"], f"meliad-edge {made['version']}, {came}"


def _require_room(address: Address, free_bytes: int, needed_bytes: int) -> None:
    needed_bytes += _SPARE_BYTES
    if needed_bytes > free_bytes:
        msg = (
            f"{address}: {free_bytes / 1e6:.0f} MB are free, {needed_bytes / 1e6:.0f} MB are needed; nothing was "
            "changed, make room there: du -xh --max-depth=2 ~ | sort -h | tail"
        )
        raise DeviceError(msg)


def _read_key(file: Path) -> bytes:
    from meliad_edge.signing import read_public_key

    return read_public_key(file).to_line().encode()


def _device(launcher: str, action: str) -> str:
    return f"{shlex.quote(launcher)} -m meliad_edge.device {action}"
