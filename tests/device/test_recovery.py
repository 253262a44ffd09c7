from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meliad_edge.device.recovery import compose_command, find_board, require_ready
from meliad_edge.errors import DeviceError, UsageError


def plug_in(root: Path, vendor: str, product: str) -> Path:
    folder = root / "sys/bus/usb/devices/1-2"
    folder.mkdir(parents=True)
    (folder / "idVendor").write_text(f"{vendor}\n")
    (folder / "idProduct").write_text(f"{product}\n")
    return root


@pytest.mark.parametrize(
    ("vendor", "product", "board"),
    [("0955", "7523", "orin-nano"), ("0955", "7023", "agx-orin"), ("0955", "7020", None), ("1d6b", "7523", None)],
)
def test_a_board_in_recovery_mode_is_seen_on_usb(tmp_path: Path, vendor: str, product: str, board: str | None) -> None:
    """0955:7020 is a Jetson that has started its system."""
    assert find_board(plug_in(tmp_path, vendor, product)) == board


def test_the_command_is_shown_and_not_run(invoke: Any, tmp_path: Path) -> None:
    outcome = invoke("flash", "--os", "agx-orin", "--jetson-linux", tmp_path, "--json")
    assert outcome.code == 0
    assert outcome.json["command"] == compose_command("agx-orin")
    assert outcome.json["run"] is False
    assert (
        f"cd {tmp_path} && sudo ./tools/kernel_flash/l4t_initrd_flash.sh jetson-agx-orin-devkit internal" in outcome.err
    )
    assert "add --run to run it" in outcome.err


def test_running_it_needs_the_tool_and_the_board(invoke: Any, tmp_path: Path) -> None:
    outcome = invoke("flash", "--os", "orin-nano", "--jetson-linux", tmp_path, "--run")
    assert outcome.code == 11
    assert "l4t_initrd_flash.sh: no such file; unpack Jetson Linux" in outcome.error_line
    tool = tmp_path / "tools/kernel_flash/l4t_initrd_flash.sh"
    tool.parent.mkdir(parents=True)
    tool.touch()
    with pytest.raises(DeviceError, match=r"no Jetson Orin Nano .* in recovery mode \(seen: Jetson AGX Orin"):
        require_ready("orin-nano", tmp_path, plug_in(tmp_path / "root", "0955", "7023"))
    require_ready("agx-orin", tmp_path, tmp_path / "root")


def test_an_unknown_board_is_refused(invoke: Any) -> None:
    outcome = invoke("flash", "--os", "xavier")
    assert outcome.code == 2
    assert outcome.error_line.startswith("--os xavier: known boards are orin-nano, agx-orin;")
    with pytest.raises(UsageError):
        compose_command("xavier")


def test_flash_without_a_device_says_what_it_takes(invoke: Any) -> None:
    outcome = invoke("flash")
    assert outcome.code == 2
    assert outcome.error_line == "name the device and the bundle: meliad-edge flash HOST MODEL.meliad"
