"""The operating system of a Jetson stays NVIDIA's to flash: this finds the board in recovery mode and the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meliad_edge.device.system_files import read_text
from meliad_edge.errors import DeviceError, UsageError

_NVIDIA_USB = "0955"
_TOOL = Path("tools/kernel_flash/l4t_initrd_flash.sh")


@dataclass(frozen=True, slots=True)
class Board:
    """A developer kit and how NVIDIA's tool names it.

    Attributes:
        name: For people.
        configuration: Of the board, in Jetson Linux.
        usb_products: USB product of each of its modules in recovery mode.
        storage: Where the system goes by default.
    """

    name: str
    configuration: str
    usb_products: tuple[str, ...]
    storage: str


# Jetson Linux 36 (JetPack 6), "Quick Start": configurations and the USB products of modules in recovery mode.
BOARDS = {
    "orin-nano": Board(
        "Jetson Orin Nano or NX developer kit",
        "jetson-orin-nano-devkit",
        ("7323", "7423", "7523", "7623"),
        "nvme0n1p1",
    ),
    "agx-orin": Board("Jetson AGX Orin developer kit", "jetson-agx-orin-devkit", ("7023", "7223"), "internal"),
}


def find_board(root: Path = Path("/")) -> str | None:
    """Key in :data:`BOARDS` of the board that is connected in recovery mode, from the USB devices in sysfs."""
    for device in sorted(root.glob("sys/bus/usb/devices/*/idVendor")):
        if read_text(device) == _NVIDIA_USB:
            product = read_text(device.with_name("idProduct"))
            for key, board in BOARDS.items():
                if product in board.usb_products:
                    return key
    return None


def compose_command(key: str) -> list[str]:
    """NVIDIA's command that flashes the system of a board, to be run in the unpacked ``Linux_for_Tegra``.

    Raises:
        UsageError: There is no such board.
    """
    board = BOARDS.get(key)
    if board is None:
        msg = f"--os {key}: known boards are {', '.join(BOARDS)}; for others see NVIDIA's Jetson Linux guide"
        raise UsageError(msg)
    options: list[str] = []
    if board.storage != "internal":
        options = ["--external-device", board.storage, "-c", "tools/kernel_flash/flash_l4t_t234_nvme.xml"]
        options += ["-p", "-c bootloader/generic/cfg/flash_t234_qspi.xml", "--showlogs", "--network", "usb0"]
    return ["sudo", f"./{_TOOL}", *options, board.configuration, "internal"]


def require_ready(key: str, jetson_linux: Path, root: Path = Path("/")) -> None:
    """Refuse to run the command where it cannot work.

    Raises:
        DeviceError: The tool is not there, or the board is not in recovery mode.
    """
    tool = jetson_linux / _TOOL
    if not tool.is_file():
        msg = f"{tool}: no such file; unpack Jetson Linux and its root file system, then name it with --jetson-linux"
        raise DeviceError(msg)
    found = find_board(root)
    if found != key:
        seen = "none" if found is None else BOARDS[found].name
        msg = (
            f"no {BOARDS[key].name} is connected in recovery mode (seen: {seen}); hold the recovery pin to ground "
            "while switching on, then: lsusb -d 0955:"
        )
        raise DeviceError(msg)
