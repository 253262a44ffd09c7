from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from meliad_edge.device.slots import Home, Slot, read_record
from meliad_edge.errors import DeviceError

ROOT = Path(__file__).parents[2]


def stage(home: Home, version: int) -> Slot:
    home.clear_staging()
    (home.staging / "model.meliad").write_text(str(version))
    return Slot(name="metal", version=version, manifest_sha256="0" * 64, installed_at=0.0)


def flash(home: Home, version: int) -> None:
    home.switch(home.fill_idle(stage(home, version)), 1.0)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A device with version 2, and version 1 to go back to."""
    home = Home(tmp_path / "home")
    for version in (1, 2):
        flash(home, version)
        home.confirm()
    return home


def version_of(home: Home) -> int | None:
    current = home.current()
    slot = None if current is None else home.read_slot(current)
    return None if slot is None else slot.version


def test_a_power_cut_before_any_change_to_the_disk_leaves_a_whole_model() -> None:
    """Each action in a process that is killed before its first, second, ... change, then the device starts again."""
    memory = {"TMPDIR": "/dev/shm"} if Path("/dev/shm").is_dir() else {}  # syncing to a disk takes longer
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("power_cuts.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | memory,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    seen = {action: list(group) for action, group in groupby(records, key=lambda record: record["action"])}
    left = {action: {record["model"] for record in group} for action, group in seen.items()}
    # An unconfirmed model never runs after a power cut; what was confirmed, or rolled back to, is one of the two.
    assert left == {
        "first flash": {None},
        "flash": {"2"},
        "confirm": {"2", "3"},
        "go back": {"2"},
        "roll back": {"2", "1"},
    }
    for action, group in seen.items():
        assert len(group) > 2, action
        assert [record["cut"] for record in group] == [*range(1, len(group)), None]
    assert all(record.get("agrees", True) for record in records)
    assert {record["next"] for record in records} == {"9"}


def test_a_model_on_probation_is_not_one_to_go_back_to(home: Home) -> None:
    flash(home, 3)
    home.go_back("watch failed 3 times")
    assert version_of(home) == 2
    with pytest.raises(DeviceError, match="no model to go back to .*was given up: watch failed 3 times"):
        home.roll_back()


def test_rolling_back_twice_comes_back(home: Home) -> None:
    assert home.roll_back().version == version_of(home) == 1
    assert home.roll_back().version == version_of(home) == 2


def test_rolling_back_on_probation_ends_it(home: Home) -> None:
    flash(home, 3)
    assert home.roll_back().version == version_of(home) == 2
    assert home.read_trial() is None


def test_an_empty_device_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="the other slot is empty"):
        Home(tmp_path).roll_back()


def test_a_failed_first_model_leaves_none(tmp_path: Path) -> None:
    home = Home(tmp_path)
    flash(home, 1)
    home.go_back("too slow")
    assert home.current() is None


def test_two_at_once_exclude_each_other(home: Home) -> None:
    with home.lock():
        assert home.is_locked()
        with pytest.raises(DeviceError, match="another flash or rollback is under way"), home.lock():
            pass
    assert not home.is_locked()
    with home.lock():
        pass


@pytest.mark.parametrize("content", [b"", b"{", b'{"slot": "c"}', b"\xff" * 100_000])
def test_a_damaged_record_is_named(home: Home, content: bytes) -> None:
    file = home.folder / "trial.json"
    file.write_bytes(content)
    with pytest.raises(DeviceError, match=r"trial\.json: damaged"):
        home.read_trial()


def test_records_are_for_their_owner_alone(home: Home) -> None:
    """A source may hold the password of a camera."""
    file = home.slot_folder("a") / "slot.json"
    assert file.stat().st_mode & 0o077 == 0
    assert read_record(file, Slot) is not None


def test_root_becomes_the_user_that_owns_the_folder(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    os.chown(tmp_path, 12345, 12346)
    program = (
        "import os; from meliad_edge.device.__main__ import _leave_root; from meliad_edge.device.slots import "
        "device_home; _leave_root(device_home()); print(os.getuid(), os.geteuid(), os.getgid(), os.getgroups())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"MELIAD_EDGE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "12345 12345 12346 []\n", done.stderr
