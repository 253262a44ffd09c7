"""Ten devices, each with an SSH server of its own, flashed in waves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.device.flash import FlashSettings
from meliad_edge.device.fleet import read_inventory, to_waves
from meliad_edge.device.watch_folder import compose_watch
from meliad_edge.errors import UsageError

DEVICES = 10


@pytest.fixture(scope="module")
def fleet(make_device: Any) -> list[Any]:
    return [make_device("fleet") for _ in range(DEVICES)]


@pytest.fixture(scope="module")
def inventory(fleet: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A canary, three devices, then six."""
    waves = [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    path = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    path.write_text(
        "".join(
            f'[[device]]\nhost = "{device.name}"\nwave = {wave}\ninstalled = true\npython = "{sys.executable}"\n'
            for device, wave in zip(fleet, waves, strict=True)
        )
    )
    return path


@pytest.mark.workshop
def test_the_first_bad_wave_is_the_last_and_the_same_call_goes_on(
    fleet: list[Any],
    inventory: Path,
    make_bundle: Any,
    at_workshop: Any,
    invoke: Any,
    tmp_path: Path,
) -> None:
    bad = fleet[2]
    (bad.folder / "home").write_text("a file where the folder shall be")
    report = tmp_path / "fleet.html"
    command = ("flash", inventory, make_bundle(1), "--trust", at_workshop.public_key, "--probation", 1, "--json")
    outcome = invoke(*command, "--report", report)
    assert outcome.code == 9
    assert outcome.error_line.startswith(
        f"1 of 10 devices failed, 6 were not tried after them; the first: {bad.name}: "
    )
    verdicts = [device["verdict"] for device in outcome.json["devices"]]
    assert verdicts == ["installed"] * 2 + ["failed"] + ["installed"] + ["not tried"] * 6
    assert [device["wave"] for device in outcome.json["devices"]] == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    page = report.read_text()
    assert "3 installed, 1 failed, 6 not tried" in page
    assert page.count("<td>probation</td>") == 3
    assert all(device.name in page for device in fleet)
    assert "http" not in page

    (bad.folder / "home").unlink()
    outcome = invoke(*command)
    assert outcome.code == 0, outcome.err
    verdicts = [device["verdict"] for device in outcome.json["devices"]]
    assert verdicts == ["unchanged"] * 2 + ["installed"] + ["unchanged"] + ["installed"] * 6
    assert {device.running() for device in fleet} == {("metal", 1)}

    status = invoke("status", inventory, "--json").json["devices"]
    assert [device["host"] for device in status] == [device.name for device in fleet]
    assert {device["slots"][device["current"]]["version"] for device in status} == {1}
    outcome = invoke("rollback", inventory)
    assert outcome.code == 9
    assert outcome.error_line == "10 of 10 devices did not go back; each was reported above"
    assert json.loads(invoke("rollback", inventory, "--json").out)["devices"][0]["error"].startswith(fleet[0].name)


def test_the_canary_goes_first(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[[device]]\nhost = "a"\nwave = 2\n[[device]]\nhost = "b"\n[[device]]\nhost = "c"\n'
        '[[device]]\nhost = "d"\nwave = 2\ncanary = true\n'
    )
    devices = read_inventory(path)
    assert {wave: [d.host for d in members] for wave, members in to_waves(devices).items()} == {
        0: ["d"],
        1: ["b", "c"],
        2: ["a"],
    }
    assert {wave: [d.host for d in members] for wave, members in to_waves(devices[:3]).items()} == {
        0: ["b"],
        1: ["c"],
        2: ["a"],
    }


def test_each_device_may_have_a_watch_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "line3.toml").write_text('serve = "8080"\n[[camera]]\nsource = "rtsp://cam3/x"\nwindow = "1/1"\n')
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[[device]]\nhost = "a"\nconfig = "line3.toml"\nsources = ["csi://0"]\n[[device]]\nhost = "b"\n'
        '[[device]]\nhost = "c"\nsources = []\n'
    )
    a, b, c = read_inventory(path)
    common = FlashSettings(watch=compose_watch(["csi://1"], None, "2/2"), window="4/6")
    watches = [device.settings(common).watch for device in (a, b, c)]
    seen = [[(camera.source, camera.window) for camera in watch.config.camera] for watch in watches if watch]
    assert seen == [[("rtsp://cam3/x", "1/1"), ("csi://0", "4/6")], [("csi://1", "2/2")], []]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[device]", "cannot be read"),
        ("", "device: field required; the keys are host, wave, canary, sources, config, python, installed"),
        ('[[device]]\nhost = "a"\ncolour = 1', "device.0.colour: extra inputs are not permitted"),
        ('[[device]]\nhost = "a"\n[[device]]\nhost = "a"', "a is named twice"),
        ('[[device]]\nhost = "a"\nwave = 0', "device.0.wave: input should be greater than or equal to 1"),
    ],
)
def test_an_inventory_that_cannot_be_used_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match="fleet.toml") as raised:
        read_inventory(path)
    assert reason in str(raised.value)


def test_a_report_is_for_fleets(invoke: Any, tmp_path: Path, make_bundle: Any) -> None:
    outcome = invoke("flash", "host", make_bundle(1), "--report", tmp_path / "x.html")
    assert outcome.code == 2
    assert outcome.error_line.startswith("--report is about fleets")
