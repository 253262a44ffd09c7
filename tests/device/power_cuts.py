"""Kills a process before each change it makes to the disk, and says what it left: one JSON line per cut."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from meliad_edge.device.slots import Home, Slot

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree"}


def is_change(event: str, arguments: tuple[object, ...]) -> bool:
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES


def slot(version: int) -> Slot:
    return Slot(name="metal", version=version, manifest_sha256="0" * 64, installed_at=0.0)


def stage(home: Home, version: int) -> None:
    home.clear_staging()
    (home.staging / "model.meliad").write_text(str(version))


def flash(home: Home, version: int) -> None:
    stage(home, version)
    home.switch(home.fill_idle(slot(version)), 1.0)


def device_with(versions: int) -> Home:
    """A device that has confirmed so many models, one after the other."""
    home = Home(Path(tempfile.mkdtemp()))
    for version in range(1, versions + 1):
        flash(home, version)
        home.confirm()
    return home


def boot(home: Home) -> None:
    """What the watch service does first."""
    if home.read_trial() is not None:
        home.go_back("interrupted")


def on_trial() -> Home:
    home = device_with(2)
    flash(home, 3)
    return home


ACTIONS: dict[str, tuple[Callable[[], Home], Callable[[Home], object]]] = {
    "first flash": (lambda: device_with(0), lambda home: flash(home, 1)),
    "flash": (lambda: device_with(2), lambda home: flash(home, 3)),
    "confirm": (on_trial, Home.confirm),
    "go back": (on_trial, lambda home: home.go_back("failed")),
    "roll back": (lambda: device_with(2), Home.roll_back),
}


def cut_at(number: int, home: Home, act: Callable[[Home], object]) -> bool:
    """Do it in a process that is killed before its change of that number; whether it was."""
    pid = os.fork()
    if pid == 0:
        left = number

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if is_change(event, arguments):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        act(home)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def describe(home: Home) -> dict[str, object]:
    current = home.current()
    if current is None:
        return {"model": None}
    held = home.read_slot(current)
    model = (home.slot_folder(current) / "model.meliad").read_text()
    return {"model": model, "agrees": held is not None and str(held.version) == model}


for name, (make, act) in ACTIONS.items():
    number, was_cut = 0, True
    while was_cut:
        number += 1
        home = make()
        was_cut = cut_at(number, home, act)
        boot(home)
        record = {"action": name, "cut": number if was_cut else None, **describe(home)}
        flash(home, 9)  # whatever was left, the next flash goes through
        home.confirm()
        print(json.dumps({**record, "next": describe(home)["model"]}))
