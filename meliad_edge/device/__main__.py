"""What is asked of a device over SSH: ``python -m meliad_edge.device ACTION``, answered in JSON lines."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meliad_edge.child_process import end_with_parent
from meliad_edge.device.slots import WATCH_FILE, Home, SlotName, device_home
from meliad_edge.errors import MeliadError, UsageError

_SHOWN_LOG_BYTES = 256 * 1024


def _plan(home: Home) -> None:
    from meliad_edge.device.install import Offer, make_plan

    _answer(make_plan(home, Offer.model_validate_json(sys.stdin.buffer.read())).model_dump())


def _install(home: Home) -> None:
    from meliad_edge.device.install import Offer, install

    # A lost link must not stop what has begun: the device ends it by itself.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    begun: dict[str, float] = {}

    def tell(step: str, text: str) -> None:
        now = time.monotonic()
        seconds = now - begun.setdefault(step, now)
        _answer({"step": step, "text": text, "seconds": seconds, "done": bool(text)})

    slot = install(home, Offer.model_validate_json(sys.stdin.buffer.read()), tell)
    _answer({"slot": slot.model_dump()})


def _trust(home: Home) -> None:
    from meliad_edge.signing import trust

    file = home.folder / "incoming" / "key.pub"
    file.write_bytes(sys.stdin.buffer.read())
    try:
        _answer({"trusted": str(trust(file, home.keys))})
    finally:
        file.unlink()


def _rollback(home: Home) -> None:
    from meliad_edge.device.service import restart_service

    with home.lock():
        slot = home.roll_back()
        restart_service(home)
    _answer({"slot": slot.model_dump()})


def _status(home: Home) -> None:
    from meliad_edge.device.status import describe

    _answer(describe(home))


def _logs(home: Home) -> None:
    from meliad_edge.device.service import log_file

    path = log_file(home)
    data = b""
    if path.exists():
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _SHOWN_LOG_BYTES))
            data = file.read()
    _answer({"lines": data.decode(errors="replace").splitlines()})


def _doctor(home: Home) -> None:
    from meliad_edge.device.probe import probe

    _answer({"facts": [asdict(fact) for fact in probe()]})


def _run(home: Home) -> None:
    from meliad_edge.device.service import serve

    serve(home)


def _watch(home: Home) -> None:
    """The watch of one slot; it ends with the service that started it."""
    end_with_parent(signal.SIGTERM)
    name: SlotName = "b" if sys.argv[2] == "b" else "a"
    if home.read_slot(name) is None:
        msg = f"slot {name} is empty; flash a model with: meliad-edge flash HOST MODEL.meliad"
        raise UsageError(msg)
    model = home.slot_folder(name) / "model.meliad"
    settings = home.slot_folder(name) / WATCH_FILE
    if settings.exists():
        from meliad_edge.cli import main

        # A watch that waits for its cameras would pass any probation.
        probation = [] if home.read_trial() is None else ["--needs-camera"]
        main(["watch", str(model), "--config", str(settings), "--json", *probation])
    else:
        _replay(model)


def _replay(model: Path) -> None:
    """With nothing to watch, decide the golden frames once more, in a process that starts as the watch would."""
    from meliad_edge.parity import check_golden, require_parity
    from meliad_edge.runtime.load import load_predictor

    predictor = load_predictor(model)
    require_parity([check_golden(predictor.bundle, predictor.engine, predictor.precision)])
    _answer({"replayed": len(predictor.bundle.golden)})


def _answer(value: dict[str, Any]) -> None:
    try:
        print(json.dumps(value), flush=True)
    except BrokenPipeError:
        # Whoever asked is gone; later lines must not fail again, at the end of the process neither.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


def _leave_root(home: Home) -> None:
    """Become the user that the folder belongs to, where root came in."""
    if os.geteuid() == 0 and home.folder.exists() and (owner := home.folder.stat()).st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


_ACTIONS: dict[str, Callable[[Home], None]] = {
    "plan": _plan,
    "install": _install,
    "trust": _trust,
    "rollback": _rollback,
    "status": _status,
    "logs": _logs,
    "doctor": _doctor,
    "run": _run,
    "watch": _watch,
}


def _main() -> None:
    home = device_home()
    try:
        _leave_root(home)
        _ACTIONS[sys.argv[1]](home)
    except (MeliadError, OSError) as error:
        code = error.exit_code if isinstance(error, MeliadError) else MeliadError.exit_code
        _answer({"error": str(error), "code": code})
        sys.exit(code)


if __name__ == "__main__":
    _main()
