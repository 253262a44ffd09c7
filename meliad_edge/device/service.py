"""The watch service of a device: one process that runs ``watch`` with the current slot and conducts its probation."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict

from meliad_edge.device.slots import Home, SlotName, Trial, read_record, write_record

State = Literal["starting", "running", "waiting", "ended"]

_MOST_FAILURES = 3
_POLL_S = 0.1
_TRIAL_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_STOP_S = 10.0
_MAX_LOG_BYTES = 4 * 1024 * 1024


class ServiceState(BaseModel):
    """What the watch service is doing.

    Attributes:
        pid: Of the service.
        slot: The slot it runs.
        state: ``"waiting"`` is the pause before a failed watch starts again; ``"ended"`` follows a video that is over.
        restarts: How often the watch has failed since the service started.
        last_exit: Exit code of the last failure; negative for a signal.
        since: Seconds since 1970 by the device's clock.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    slot: SlotName
    state: State
    restarts: int = 0
    last_exit: int | None = None
    since: float


def serve(home: Home) -> None:
    """Run the watch of the current slot until SIGTERM, or until the slot was given up.

    A probation that was under way when an earlier service died is over: the slot before it runs again.

    Raises:
        DeviceError: Another service runs.
    """
    with home.lock("service.lock"):
        trial = home.read_trial()
        if trial is not None and (trial.started or not home.is_locked()):
            home.go_back("interrupted on probation by a power cut or a crash")
        slot = home.current()
        if slot is None:
            return
        trial = home.read_trial()
        if trial is not None:
            home.update_trial(trial.model_copy(update={"started": True}))
        stop = _StopRequest()
        signal.signal(signal.SIGTERM, stop)
        _Watch(home, slot, stop).run()


def read_service(home: Home) -> ServiceState | None:
    """What the watch service is doing; None where none runs."""
    return read_record(home.folder / "service.json", ServiceState) if home.is_locked("service.lock") else None


def restart_service(home: Home) -> None:
    """Let the watch service start anew with the current slot; whoever keeps it running brings it back."""
    state = read_service(home)
    if state is not None:
        with suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)


@dataclass(slots=True)
class _StopRequest:
    """Notes SIGTERM."""

    requested: bool = False

    def __call__(self, *_: object) -> None:
        self.requested = True


@dataclass(slots=True)
class _Watch:
    """The watch of one slot: started again when it fails, confirmed or given up while on probation."""

    home: Home
    slot: SlotName
    stop: _StopRequest
    sleep: Callable[[float], None] = time.sleep
    restarts: int = 0
    last_exit: int | None = None
    begun: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Until SIGTERM, or until the slot was given up."""
        while not self.stop.requested:
            code = self._run_once()
            if code is None:
                return
            trial = self.home.read_trial()
            if code == 0:
                self.home.confirm()
                self._note("ended")
                while not self.stop.requested:
                    self.sleep(_POLL_S)
                return
            self.restarts += 1
            self.last_exit = code
            self._note("waiting")
            if trial is not None and self._give_up(trial, code):
                return
            self._pause(_TRIAL_PAUSE_S if trial is not None else min(2.0 ** (self.restarts - 1), _LONGEST_PAUSE_S))

    def _run_once(self) -> int | None:
        """Exit code of the watch; None when the service was asked to stop."""
        self._note("starting")
        with _open_log(self.home) as log:
            command = [str(self.home.slot_folder(self.slot) / "python"), "-m", "meliad_edge.device", "watch", self.slot]
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._note("running")
        try:
            while (code := child.poll()) is None:
                if self.stop.requested:
                    return None
                trial = self.home.read_trial()
                if trial is not None and time.monotonic() - self.begun >= trial.probation_s:
                    self.home.confirm()
                self.sleep(_POLL_S)
            return code
        finally:
            _end(child)

    def _give_up(self, trial: Trial, code: int) -> bool:
        """Count a failure on probation; the last one that is allowed goes back."""
        failures = trial.failures + 1
        self.home.update_trial(trial.model_copy(update={"failures": failures}))
        if failures < _MOST_FAILURES:
            return False
        self.home.go_back(
            f"watch failed {failures} times on probation, last with exit code {code}: {_last_line(self.home)}"
        )
        return True

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.stop.requested and time.monotonic() < deadline:
            self.sleep(_POLL_S)

    def _note(self, state: State) -> None:
        write_record(
            self.home.folder / "service.json",
            ServiceState(
                pid=os.getpid(),
                slot=self.slot,
                state=state,
                restarts=self.restarts,
                last_exit=self.last_exit,
                since=time.time(),
            ),
        )


def log_file(home: Home) -> Path:
    """Where the lines of the watch go."""
    return home.folder / "watch.log"


def _open_log(home: Home) -> IO[bytes]:
    path = log_file(home)
    if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
        path.replace(path.with_name("watch.log.1"))
    return path.open("ab")


def _last_line(home: Home) -> str:
    with log_file(home).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("meliad-edge: ")[:300] if lines else "it said nothing"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let a watch end in order, and not longer than it may take."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
