"""What a device does with a bundle that is offered to it: check it, try it, switch to it, and go back if need be."""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge.bundle import Bundle, Manifest, Signed, pack
from meliad_edge.device.garbage import clean
from meliad_edge.device.service import restart_service
from meliad_edge.device.slots import Home, Slot, SlotName
from meliad_edge.device.watch_folder import read_watch, stage_watch, with_events
from meliad_edge.device_threshold import threshold_file
from meliad_edge.errors import BundleError, DeviceError, SignatureError
from meliad_edge.monitor.latency import LatencySummary, summarise
from meliad_edge.parity import check_golden, require_parity
from meliad_edge.precision import Precision
from meliad_edge.runtime.load import load_predictor, open_trusted
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.signing import trusted_keys, verify
from meliad_edge.watch_config import WatchConfig

Tell = Callable[[str, str], None]

STEPS = ("verify", "engine", "parity", "latency", "switch", "probation")

_ENGINE_PRECISIONS: tuple[Precision, ...] = ("fp16", "int8", "fp32")
_WARM_UP_FRAMES = 3
_LEAST_FRAMES = 10
_MEASURED_S = 3.0
_START_S = 60.0  # a watch service must take up a trial within this, or come back to it
_POLL_S = 0.1


class Offer(BaseModel):
    """A bundle that is offered to this device.

    Attributes:
        manifest: ``manifest.json`` in base 64.
        signature: ``manifest.sig`` in base 64, empty where there is none.
        runtime: Name of the runtime that shall run it.
        watch: What it shall watch, see :class:`~meliad_edge.device.watch_folder.PackedWatch`; None keeps that of the
            current slot.
        files: Contents of the files that names, in base 64, by SHA-256.
        probation_s: How long it must run before it is confirmed.
        allow_downgrade: Whether it may be older than the current one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: str
    signature: str
    runtime: str = Field(pattern=r"^[0-9a-f]{16}$")
    watch: WatchConfig | None = None
    files: dict[str, str] = Field(default_factory=dict, repr=False)
    probation_s: float = Field(gt=0.0)
    allow_downgrade: bool = False

    def sent_files(self) -> dict[str, bytes]:
        """Contents of the files that the watch names, by SHA-256."""
        return {sha256: base64.b64decode(data) for sha256, data in self.files.items()}

    def signed(self) -> Signed:
        """The bytes of the manifest and their signature."""
        signature = base64.b64decode(self.signature)
        return Signed(base64.b64decode(self.manifest), signature or None)


class Plan(BaseModel):
    """What is left to do for an offer.

    Attributes:
        unchanged: Whether this bundle runs already, as it is offered.
        missing: SHA-256 of the parts this device lacks.
    """

    unchanged: bool
    missing: tuple[str, ...]


def make_plan(home: Home, offer: Offer) -> Plan:
    """Say what an offer lacks, after the checks that need its manifest alone.

    Raises:
        SignatureError: No key that this device trusts signed it.
        DeviceError: It is older than the current model, or another flash is under way.
    """
    manifest = _accept(home, offer)
    if home.is_locked():
        msg = "another flash or rollback is under way on this device; wait until it ends, then flash again"
        raise DeviceError(msg)
    if _is_running(home, offer):
        return Plan(unchanged=True, missing=())
    here = _find_parts(home)
    lacking = {part.sha256: None for part in manifest.parts.values() if part.sha256 not in here}
    return Plan(unchanged=False, missing=tuple(lacking))


def install(home: Home, offer: Offer, tell: Tell, *, sleep: Callable[[float], None] = time.sleep) -> Slot:
    """Put a bundle into use, step by step; until the switch, whatever runs is not touched.

    Args:
        home: The folder of meliad-edge.
        offer: The bundle, whose parts were sent before.
        tell: Called as each of :data:`STEPS` begins, with an empty text, and ends, with what came out.
        sleep: Waits.

    Raises:
        SignatureError: No key that this device trusts signed it.
        BundleError: It is damaged, or a part is missing.
        ParityError: It does not decide here as where it was made.
        DeviceError: It is older than the current one, too slow, or failed its probation.
    """
    manifest = _accept(home, offer)
    with home.lock():
        if _is_running(home, offer):
            return _slot(home)
        _settle(home)
        tell("verify", "")
        bundle = _stage(home, offer, manifest)
        tell("verify", f"{manifest.name} version {manifest.version}, {len(manifest.parts)} parts, signature good")
        tell("engine", "")
        tell("engine", _build_engine(bundle))
        tell("parity", "")
        predictor = load_predictor(bundle.path)
        result = check_golden(bundle, predictor.engine, predictor.precision)
        require_parity([result])
        tell("parity", f"{result.engine}: {result.frames} frames, 0 label flips, score error {result.score_error:.3%}")
        tell("latency", "")
        tell("latency", _check_budget(predictor, manifest.latency_budget_ms))
        tell("switch", "")
        current = home.current()
        running = None if current is None else home.read_slot(current)
        slot = Slot(
            name=manifest.name,
            version=manifest.version,
            manifest_sha256=hashlib.sha256(offer.signed().manifest).hexdigest(),
            installed_at=time.time(),
        )
        watch = stage_watch(home, offer.watch, offer.sent_files())
        if current is not None and running is not None and running.manifest_sha256 == slot.manifest_sha256:
            _keep_threshold(home, current)
        name = home.fill_idle(slot)
        home.switch(name, offer.probation_s)
        restart_service(home)
        tell("switch", f"slot {name}" + ("" if current is None else f"; slot {current} is kept to go back to"))
        tell("probation", "")
        _await_trial(home, name, sleep)
        watched = "decided as it must in a new process" if watch is None else f"watched {len(watch.camera)} source(s)"
        tell("probation", f"{watched}; confirmed")
        clean(home)
        return _slot(home)


def _accept(home: Home, offer: Offer) -> Manifest:
    """The manifest of an offer, read only after its signature was found good."""
    signed = offer.signed()
    trusted = trusted_keys(home.keys)
    if not trusted:
        msg = "this device trusts no key yet, so it takes no model; hand it one with: --trust NAME.pub"
        raise SignatureError(msg)
    verify(signed.manifest, signed.signature, trusted, datetime.date.today())
    try:
        manifest = Manifest.model_validate_json(signed.manifest)
    except ValidationError as error:
        msg = f"the manifest is not one that this device's meliad-edge reads ({error.errors()[0]['msg']}); export again"
        raise BundleError(msg) from error
    current = home.current()
    running = None if current is None else home.read_slot(current)
    if running is not None and manifest.version < running.version and not offer.allow_downgrade:
        msg = (
            f"version {manifest.version} is older than version {running.version}, which runs; "
            "to go back anyway: --allow-downgrade"
        )
        raise DeviceError(msg)
    return manifest


def _is_running(home: Home, offer: Offer) -> bool:
    """Whether the current slot is confirmed and holds this bundle, with this runtime, and watches what is asked for."""
    current = home.current()
    slot = None if current is None else home.read_slot(current)
    if current is None or slot is None or not slot.confirmed or home.read_trial() is not None:
        return False
    return (
        slot.manifest_sha256 == hashlib.sha256(offer.signed().manifest).hexdigest()
        and (home.slot_folder(current) / "python").readlink().parent.name == offer.runtime
        and (offer.watch is None or _watches(home, current, offer.watch))
    )


def _watches(home: Home, name: SlotName, wanted: WatchConfig) -> bool:
    """Whether a slot watches what is wanted, and as it is wanted."""
    if not wanted.camera:
        return read_watch(home, name) is None
    return read_watch(home, name) == with_events(wanted, home.folder / "events")


def _keep_threshold(home: Home, name: SlotName) -> None:
    """What was set on this device for the very same model stays."""
    own = threshold_file(home.slot_folder(name) / "model.meliad")
    if own.exists():
        shutil.copy(own, home.staging)


def _settle(home: Home) -> None:
    """Undo a probation that nobody conducts any more.

    Raises:
        DeviceError: It is still under way.
    """
    trial = home.read_trial()
    if trial is not None and trial.started and home.is_locked("service.lock"):
        msg = f"the last model is still on probation, {trial.probation_s:.0f} s in all; wait, then flash again"
        raise DeviceError(msg)
    home.go_back("its flash was interrupted")


def _slot(home: Home) -> Slot:
    current = home.current()
    slot = None if current is None else home.read_slot(current)
    assert slot is not None  # the lock is held, and it was confirmed
    return slot


def _find_parts(home: Home) -> dict[str, tuple[Path, str]]:
    """Where the parts are that this device has, by their SHA-256: a file with its name inside, if it is a bundle."""
    found: dict[str, tuple[Path, str]] = {}
    for bundle in sorted(home.folder.glob("slots/[ab]/model.meliad")):
        try:
            with zipfile.ZipFile(bundle) as archive:
                found |= {hashlib.sha256(archive.read(name)).hexdigest(): (bundle, name) for name in archive.namelist()}
        except (zipfile.BadZipFile, OSError):
            continue  # damaged: what is in it is sent again
    found |= {path.name: (path, "") for path in home.folder.glob("incoming/[!.]*")}
    return found


def _stage(home: Home, offer: Offer, manifest: Manifest) -> Bundle:
    """Put the bundle together where nothing runs, and open it as any bundle is opened."""
    here = _find_parts(home)
    home.clear_staging()
    try:
        parts = dict(_collect(manifest, here))
        path = home.staging / "model.meliad"
        pack(path, offer.signed(), parts)
        (home.staging / "python").symlink_to(Path("..", "..", "runtimes", offer.runtime, "python"))
        return open_trusted(path)
    except BaseException:
        shutil.rmtree(home.staging, ignore_errors=True)
        raise


def _collect(manifest: Manifest, here: dict[str, tuple[Path, str]]) -> Iterator[tuple[str, bytes]]:
    for name, part in manifest.parts.items():
        if part.sha256 not in here:
            msg = f"part {name} has not arrived; flash again, only what is missing travels"
            raise BundleError(msg)
        path, inside = here[part.sha256]
        if inside:
            with zipfile.ZipFile(path) as archive:
                yield name, archive.read(inside)
        else:
            yield name, path.read_bytes()


def _build_engine(bundle: Bundle) -> str:
    """Build a TensorRT engine where TensorRT is; in a process of its own, which may crash."""
    lacking = [name for name in ("tensorrt", "pycuda", "onnx") if importlib.util.find_spec(name) is None]
    if lacking:
        return f"none, ONNX Runtime decides: {lacking[0]} is not installed on the device"
    precision = next(p for p in _ENGINE_PRECISIONS if p in bundle.models)
    program = "from meliad_edge.cli import main; main()"
    command = [sys.executable, "-c", program, "build", str(bundle.path), "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"none, ONNX Runtime decides: {reason.removeprefix('meliad-edge: ')}"
    return f"TensorRT in {precision}"


def _check_budget(predictor: Predictor, budget_ms: float | None) -> str:
    """Time the golden frames and hold their 95th percentile against the budget of the bundle."""
    summary = _time_frames(predictor)
    p95_ms = 1e3 * summary.p95_s
    measured = f"p95 {p95_ms:.1f} ms over {summary.count} frames"
    if budget_ms is not None and p95_ms > budget_ms:
        msg = f"too slow here: {measured}, the budget is {budget_ms:g} ms; export a lower precision or a smaller input"
        raise DeviceError(msg)
    return f"{measured}, " + ("no budget" if budget_ms is None else f"budget {budget_ms:g} ms")


def _time_frames(predictor: Predictor) -> LatencySummary:
    """From a frame in memory to the decision, over and over the golden frames, beside whatever runs already."""
    frames = [golden.frame for golden in predictor.bundle.golden]
    for index in range(_WARM_UP_FRAMES):
        predictor.predict(frames[index % len(frames)])
    samples_s: list[float] = []
    while len(samples_s) < _LEAST_FRAMES or (sum(samples_s) < _MEASURED_S and len(samples_s) < 10 * _LEAST_FRAMES):
        samples_s.append(predictor.predict(frames[len(samples_s) % len(frames)]).times.total_s)
    return summarise(samples_s)


def _await_trial(home: Home, name: SlotName, sleep: Callable[[float], None]) -> None:
    """Wait until the watch service has confirmed a slot or gone back.

    Raises:
        DeviceError: It went back, or no service came.
    """
    alone_s = 0.0
    while (trial := home.read_trial()) is not None:
        alone_s = 0.0 if trial.started and home.is_locked("service.lock") else alone_s + _POLL_S
        if alone_s > _START_S:
            home.go_back("no watch service took it up")
            break
        sleep(_POLL_S)
    slot = home.read_slot(name)
    if home.current() != name or slot is None or not slot.confirmed:
        failure = "" if slot is None else slot.failure
        current = home.current()
        kept = "no model runs" if current is None else f"slot {current} runs as before"
        msg = f"gave up the new model: {failure or 'its probation was interrupted'}; {kept}"
        raise DeviceError(msg)
