"""A wheel and a bundle from this machine in an emulated 64-bit ARM system: slow, because every program there is."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.bundle import open_bundle

ROOT = Path(__file__).parents[2]

# What Ubuntu 22.04 has, which is JetPack 6: the oldest device.
OLDEST_DEVICE = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}

KERNEL_OFF = {"MELIAD_EDGE_KERNEL": "off"}
ENGINES = [
    ("fp32", "onnxruntime-cpu+kernel", {}),
    ("fp32", "onnxruntime-cpu", KERNEL_OFF),
    ("int8", "onnxruntime-cpu+kernel", {}),
]


def _readelf(*arguments: object) -> str:
    return subprocess.run(
        ["readelf", "--wide", *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("name", ["libmeliad_kernels.so", "libmeliad_ort.so"])
def test_the_libraries_need_no_more_than_the_oldest_device_has(aarch64_wheel: Path, name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(aarch64_wheel) as archive:
        library = archive.extract(f"meliad_edge/_kernels/{name}", tmp_path)
    assert "AArch64" in _readelf("--file-header", library)
    needed = re.findall(r"NEEDED.*\[(.*)\]", _readelf("--dynamic", library))
    assert set(needed) <= {"libc.so.6", "libgcc_s.so.1", "libm.so.6", "libstdc++.so.6"}
    versions = re.findall(r"Name: ([A-Z]+)_([\d.]+)", _readelf("--version-info", library))
    assert versions
    for family, version in versions:
        assert tuple(map(int, version.split("."))) <= OLDEST_DEVICE[family], f"{family}_{version}"


def test_equal_sources_give_equal_wheels(aarch64_wheel: Path, tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts" / "build_aarch64_wheel.sh", tmp_path, sys.executable], check=True)
    assert (tmp_path / aarch64_wheel.name).read_bytes() == aarch64_wheel.read_bytes()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    command = [ROOT / "scripts" / "make_aarch64_root.sh", tmp_path, sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"aarch64 root: {tmp_path} is something else; name a folder that is not there\n"
    assert (tmp_path / "mine").exists()


def test_doctor_sees_the_device_and_the_kernel(emulated_device: Any) -> None:
    outcome = emulated_device.run("meliad-edge", "doctor", "--json")
    assert outcome.code == 0, outcome.err
    assert "cpuinfo" not in outcome.err  # ONNX Runtime knows the processor
    facts = {fact["name"]: fact["value"] for fact in outcome.json["facts"]}
    assert facts["system"].endswith(", aarch64")
    assert facts["scoring kernel"].endswith("/libmeliad_ort.so")
    assert outcome.json["ok"] is True


@pytest.fixture(scope="module")
def device(emulated_device: Any, precise_bundle: Path, texture_set: Path) -> Any:
    """The emulated device with the bundle and the pictures."""
    for path in (precise_bundle, texture_set):
        emulated_device.receive(path)
    return emulated_device


def test_the_golden_frames_are_decided_as_by_the_trained_model(device: Any, precise_bundle: Path) -> None:
    outcome = device.run("meliad-edge", "check", precise_bundle, "--json")
    engines = {engine["precision"]: engine for engine in outcome.json["engines"]}
    assert list(engines) == ["fp32", "fp16", "int8"]
    assert {engine["engine"] for engine in engines.values()} == {"onnxruntime-cpu+kernel (golden)"}
    assert {engine["frames"] for engine in engines.values()} == {8}
    assert engines["fp32"]["passed"]
    assert engines["int8"]["passed"]
    # ARM processors add in half precision, too: where that changes a decision, the device says so.
    if engines["fp16"]["passed"]:
        assert outcome.code == 0, outcome.err
    else:
        assert outcome.code == 6
        assert outcome.error_line.startswith("onnxruntime-cpu+kernel (golden) in fp16 does not decide as the trained")


@pytest.mark.parametrize(("precision", "engine", "environment"), ENGINES)
def test_every_picture_is_decided_as_here(
    precision: str,
    engine: str,
    environment: dict[str, str],
    device: Any,
    invoke: Any,
    precise_bundle: Path,
    texture_set: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = ("predict", precise_bundle, *sorted(texture_set.glob("test/*/*.png")), "--precision", precision, "--json")
    expected = invoke(*command).json["predictions"]
    outcome = device.run("meliad-edge", *command, **environment)
    assert outcome.code == 0, outcome.err
    assert outcome.json["engine"] == engine
    assert {prediction["decision"] for prediction in expected} == {"normal", "anomaly"}
    bundle = open_bundle(precise_bundle)
    limits, spread = bundle.manifest.precisions[precision], bundle.calibration.spread
    for there, here in zip(outcome.json["predictions"], expected, strict=True):
        assert there.pop("score") == pytest.approx(here.pop("score"), rel=0, abs=limits.score * spread)
        for cells, expected_cells in zip(there.pop("map"), here.pop("map"), strict=True):
            assert cells == pytest.approx(expected_cells, rel=0, abs=limits.map * spread)
        for region, expected_region in zip(there["regions"], here["regions"], strict=True):
            assert region.pop("peak") == pytest.approx(expected_region.pop("peak"), rel=0, abs=limits.map * spread)
        assert there == here  # the decision, its threshold, where and like what


@pytest.mark.parametrize("damage", ["cut short", "one byte changed"])
def test_a_damaged_bundle_is_refused_as_here(
    damage: str, device: Any, invoke: Any, precise_bundle: Path, texture_set: Path, tmp_path: Path
) -> None:
    content = bytearray(precise_bundle.read_bytes())
    if damage == "cut short":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    damaged = tmp_path / "damaged.meliad"
    damaged.write_bytes(content)
    device.receive(damaged)
    command = ("predict", damaged, texture_set / "test" / "good" / "000.png")
    here, there = invoke(*command), device.run("meliad-edge", *command)
    assert (there.code, there.error_line) == (here.code, here.error_line)
    assert here.code == 5
