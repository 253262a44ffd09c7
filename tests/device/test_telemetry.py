"""What a machine says of itself, from a tree of files as systems have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from meliad_edge.device.telemetry import Telemetry, energy_between_j, read_telemetry


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_jetson(tmp_path: Path) -> None:
    monitor = "sys/class/hwmon/hwmon3"
    root = write(
        tmp_path,
        {
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "729600",
            "sys/class/thermal/thermal_zone0/temp": "48500",
            "sys/class/thermal/thermal_zone1/temp": "51250",
            f"{monitor}/in1_label": "VDD_IN",
            f"{monitor}/in1_input": "5000",
            f"{monitor}/curr1_input": "1240",
            f"{monitor}/in2_label": "VDD_CPU_GPU_CV",
            f"{monitor}/in2_input": "5000",
            f"{monitor}/curr2_input": "400",
        },
    )
    reading = read_telemetry(root)
    assert (reading.cpu_mhz, reading.temperature_c) == (1120.0, 51.25)
    assert reading.power_w == pytest.approx(6.2)
    assert (reading.energy_j, reading.throttle_count) == (None, None)


def test_a_server_with_counters(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "cpu MHz\t\t: 2000.5\nmodel name : x\ncpu MHz\t\t: 2999.5",
            "sys/class/powercap/intel-rapl:0/energy_uj": "1500000",
            "sys/class/powercap/intel-rapl:0:0/energy_uj": "700000",
            "sys/class/powercap/intel-rapl:1/energy_uj": "2500000",
            "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3",
            "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "4",
        },
    )
    reading = read_telemetry(root)
    # The cores' counter is part of the socket's.
    assert (reading.cpu_mhz, reading.energy_j, reading.throttle_count) == (2500.0, 4.0, 7)


def test_a_machine_that_says_nothing_or_nonsense(tmp_path: Path) -> None:
    root = write(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "", "proc/cpuinfo": "processor : 0"})
    reading = read_telemetry(root)
    assert (reading.cpu_mhz, reading.temperature_c, reading.energy_j, reading.power_w) == (None, None, None, None)


def reading(time_s: float, energy_j: float | None = None, power_w: float | None = None) -> Telemetry:
    return Telemetry(time_s, None, None, None, energy_j, power_w)


def test_energy_is_the_counters_difference_or_power_times_time() -> None:
    assert energy_between_j([reading(0.0, 5.0), reading(1.0, 7.0), reading(2.0, 9.5)]) == 4.5
    assert energy_between_j([reading(0.0, power_w=4.0), reading(1.0, power_w=5.0), reading(3.0, power_w=6.0)]) == 15.0
    assert energy_between_j([reading(0.0), reading(1.0)]) is None
    # The counter started again.
    assert energy_between_j([reading(0.0, 9.0), reading(1.0, 2.0)]) is None
