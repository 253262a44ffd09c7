"""How fast, how hot and how hungry a machine is at a moment, from files of the system; no vendor's tool is asked."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meliad_edge.device.system_files import read_text

_RAPL = "sys/class/powercap/intel-rapl:*"
_HWMON = "sys/class/hwmon/hwmon*"
# The rail that feeds a whole Jetson module, by the labels of its monitors.
_MODULE_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0")


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What the system tells of itself; None where it does not.

    Attributes:
        time_s: When, on the monotonic clock.
        cpu_mhz: Mean clock of the processor's cores.
        temperature_c: Of the hottest sensor.
        throttle_count: How often the processor slowed itself down since it started.
        energy_j: Counter of the energy that processor or module has used.
        power_w: Power of the module at this moment.
    """

    time_s: float
    cpu_mhz: float | None
    temperature_c: float | None
    throttle_count: int | None
    energy_j: float | None
    power_w: float | None


def read_telemetry(root: Path = Path("/")) -> Telemetry:
    """Read clocks, temperature, energy and power.

    Args:
        root: Where the system's files are.
    """
    clocks = [value / 1e3 for value in _numbers(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if not clocks:
        clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", read_text(root / "proc/cpuinfo"), re.M)]
    temperatures = list(_numbers(root, "sys/class/thermal/thermal_zone*/temp"))
    throttled = list(_numbers(root, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"))
    # One counter per socket; those of a socket's parts are named intel-rapl:0:0 and so on, and are in its own.
    energies = [
        value for path in sorted(root.glob(_RAPL)) if path.name.count(":") == 1 for value in _numbers(path, "energy_uj")
    ]
    return Telemetry(
        time_s=time.monotonic(),
        cpu_mhz=sum(clocks) / len(clocks) if clocks else None,
        temperature_c=max(temperatures) / 1e3 if temperatures else None,
        throttle_count=int(sum(throttled)) if throttled else None,
        energy_j=sum(energies) / 1e6 if energies else None,
        power_w=_module_power_w(root),
    )


def energy_between_j(readings: list[Telemetry]) -> float | None:
    """Energy used from the first reading to the last, in joules; None where the system does not tell.

    The counter's difference, or the mean power times the time. A counter that started again in between says nothing.
    """
    first, last = readings[0], readings[-1]
    if first.energy_j is not None and last.energy_j is not None and last.energy_j >= first.energy_j:
        return last.energy_j - first.energy_j
    powers = [reading.power_w for reading in readings if reading.power_w is not None]
    return sum(powers) / len(powers) * (last.time_s - first.time_s) if powers else None


def _module_power_w(root: Path) -> float | None:
    """Volts times amperes of the rail that feeds the module, from the INA3221 monitors of a Jetson."""
    for monitor in sorted(root.glob(_HWMON)):
        for label in sorted(monitor.glob("in*_label")):
            if read_text(label) in _MODULE_RAILS:
                number = label.name.removeprefix("in").removesuffix("_label")
                volts, amperes = (list(_numbers(monitor, f"{kind}{number}_input")) for kind in ("in", "curr"))
                if volts and amperes:
                    return volts[0] / 1e3 * amperes[0] / 1e3
    return None


def _numbers(folder: Path, pattern: str) -> Iterator[float]:
    for path in folder.glob(pattern):
        if re.fullmatch(r"-?\d+", text := read_text(path)):
            yield float(text)
