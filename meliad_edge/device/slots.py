"""Two slots for models on a device, one of them current; no power cut can halve a change.

    HOME/current -> slots/a    the model that runs; replaced by a rename
    HOME/slots/a, slots/b      model.meliad, slot.json, python (starts its runtime), engines built for it,
                               watch.json and watch/ (what it watches and the files that names)
    HOME/slots/next            the one that is being tried before it takes the idle slot
    HOME/trial.json            there while the current slot is on probation
    HOME/lock                  held by whoever changes any of these

A slot without ``slot.json`` is empty: that file is written last and removed first. A trial whose slot is not the
current one has not begun or is over: it is written before ``current`` changes and removed after.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge.device.bootstrap import home_folder
from meliad_edge.errors import DeviceError

SlotName = Literal["a", "b"]

WATCH_FILE = "watch.json"

_SLOTS: tuple[SlotName, SlotName] = ("a", "b")
_MAX_FILE_BYTES = 64 * 1024
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.05


class Slot(BaseModel):
    """What is in a slot.

    Attributes:
        name: Of the model.
        version: Of the model; an older one is refused.
        manifest_sha256: Digest of the bundle's manifest, and so of the bundle.
        installed_at: Seconds since 1970 by the device's clock.
        confirmed: Whether it has passed its probation, so that one may go back to it.
        failure: Why it was given up, else empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: int
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    installed_at: float
    confirmed: bool = False
    failure: str = ""


class Trial(BaseModel):
    """The probation of a slot.

    Attributes:
        slot: The slot on trial.
        previous: The one to go back to; None where there was no model before.
        probation_s: How long it must run.
        started: Whether a watch service has taken it up.
        failures: How often the watch has failed in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slot: SlotName
    previous: SlotName | None
    probation_s: float
    started: bool = False
    failures: int = 0


Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of meliad-edge on a device."""

    folder: Path

    @property
    def staging(self) -> Path:
        """Where a model is put together and tried before it takes a slot."""
        return self.folder / "slots" / "next"

    @property
    def keys(self) -> Path:
        """The keys this device trusts."""
        return self.folder / "keys"

    def slot_folder(self, name: SlotName) -> Path:
        """Where a slot is."""
        return self.folder / "slots" / name

    def current(self) -> SlotName | None:
        """The slot that runs; None before the first model."""
        try:
            target = (self.folder / "current").readlink().name
        except OSError:
            return None
        return next((name for name in _SLOTS if name == target), None)

    def idle(self) -> SlotName:
        """The slot that does not run."""
        return "b" if self.current() == "a" else "a"

    def read_slot(self, name: SlotName) -> Slot | None:
        """What is in a slot; None where it is empty."""
        return read_record(self.slot_folder(name) / "slot.json", Slot)

    def read_trial(self) -> Trial | None:
        """The probation under way, if there is one."""
        trial = read_record(self.folder / "trial.json", Trial)
        return trial if trial is not None and trial.slot == self.current() else None

    @contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        """Exclude everybody else until the block ends or the process dies.

        Raises:
            DeviceError: Somebody holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            for left in reversed(range(_LOCK_TRIES)):  # whoever asks whether it is held, holds it for a moment
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if left == 0:
                        msg = f"{self.folder / name} is held: another flash or rollback is under way; wait for it"
                        raise DeviceError(msg) from error
                    time.sleep(_LOCK_PAUSE_S)
            yield
        finally:
            os.close(descriptor)

    def is_locked(self, name: str = "lock") -> bool:
        """Whether somebody holds a lock."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def clear_staging(self) -> None:
        """Make an empty folder for the next model."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def fill_idle(self, slot: Slot) -> SlotName:
        """Move the model in the staging folder into the idle slot, whose own is gone then."""
        write_record(self.staging / "slot.json", slot)
        name = self.idle()
        folder = self.slot_folder(name)
        (folder / "slot.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        sync_tree(self.staging)
        self.staging.rename(folder)
        sync(folder.parent)
        return name

    def switch(self, name: SlotName, probation_s: float) -> None:
        """Make a slot the current one, on probation."""
        write_record(self.folder / "trial.json", Trial(slot=name, previous=self.current(), probation_s=probation_s))
        self._point(name)

    def update_trial(self, trial: Trial) -> None:
        """Keep what has happened in a trial."""
        write_record(self.folder / "trial.json", trial)

    def confirm(self) -> None:
        """End the probation: the current slot stays."""
        trial = self.read_trial()
        if trial is None:
            return
        slot = self.read_slot(trial.slot)
        if slot is not None:
            write_record(self.slot_folder(trial.slot) / "slot.json", slot.model_copy(update={"confirmed": True}))
        self._end_trial()

    def go_back(self, reason: str) -> None:
        """End the probation: the slot before it runs again, or none where there was none."""
        trial = self.read_trial()
        if trial is None:
            self._end_trial()
            return
        slot = self.read_slot(trial.slot)
        if slot is not None:
            failed = slot.model_copy(update={"failure": reason, "confirmed": False})
            write_record(self.slot_folder(trial.slot) / "slot.json", failed)
        self._point(trial.previous)
        self._end_trial()

    def roll_back(self) -> Slot:
        """Make the slot that does not run the current one, if it has passed its probation.

        Raises:
            DeviceError: There is none to go back to.
        """
        if self.read_trial() is not None:
            self.go_back("rolled back by hand")
            current = self.current()
            slot = None if current is None else self.read_slot(current)
        else:
            slot = self.read_slot(self.idle())
            if slot is not None and slot.confirmed:
                self._point(self.idle())
        if slot is None or not slot.confirmed:
            why = "the other slot is empty" if slot is None else f"{slot.name!r} there was given up: {slot.failure}"
            msg = f"there is no model to go back to ({why}); flash one with: meliad-edge flash HOST MODEL.meliad"
            raise DeviceError(msg)
        return slot

    def _point(self, name: SlotName | None) -> None:
        link, partial = self.folder / "current", self.folder / "current.partial"
        if name is None:
            link.unlink(missing_ok=True)
        else:
            partial.unlink(missing_ok=True)
            partial.symlink_to(Path("slots") / name)
            partial.replace(link)
        sync(self.folder)

    def _end_trial(self) -> None:
        (self.folder / "trial.json").unlink(missing_ok=True)
        sync(self.folder)


def device_home() -> Home:
    """The folder on this machine: ``MELIAD_EDGE_HOME``, else /opt/meliad-edge for root and one of the user's own."""
    return Home(home_folder())


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """Read a file that :func:`write_record` wrote; None where there is none.

    Raises:
        DeviceError: It is damaged.
    """
    try:
        with path.open("rb") as file:
            return kind.model_validate_json(file.read(_MAX_FILE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        msg = f"{path}: damaged, although it is only ever replaced whole; check the disk, then remove the file"
        raise DeviceError(msg) from error


def write_record(path: Path, record: BaseModel) -> None:
    """Write a file that is there whole or not at all, even after a power cut."""
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(record.model_dump_json(indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until all files below a folder, and their names, are on the disk."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            sync_tree(path)
        elif not path.is_symlink():
            sync(path)
    sync(folder)
