from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from meliad_edge.device.probe import Fact, cpu_name, driver_version, probe

JETSON = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=15W >\n",
    "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/cpuinfo": "".join(f"processor\t: {n}\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n\n" for n in range(6)),
    "proc/meminfo": "MemTotal:        7813592 kB\nMemFree:          300000 kB\nMemAvailable:     500000 kB\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "624750000\n",
    "sys/class/thermal/thermal_zone0/temp": "51250\n",
    "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "sys/class/video4linux/video0/name": "vi-output, imx219 9-0010\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1510400\n",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
    "usr/lib/aarch64-linux-gnu/gstreamer-1.0/libgstnvarguscamerasrc.so": "",
    "usr/lib/aarch64-linux-gnu/gstreamer-1.0/libgstvideo4linux2.so": "",
    "dev/video10": "",
    "dev/video0": "",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def named(facts: tuple[Fact, ...], name: str) -> Fact:
    (fact,) = (fact for fact in facts if fact.name == name)
    return fact


def test_this_machine_can_run_and_every_complaint_has_a_fix():
    facts = probe()
    assert not [fact for fact in facts if fact.required and fact.status == "missing"]
    for fact in facts:
        assert bool(fact.fix) == (fact.status in ("warn", "missing")), fact
    groups = [topic for topic, _ in groupby(facts, key=lambda fact: fact.topic)]
    assert len(groups) == len(set(groups))


def test_a_jetson_is_recognised_from_its_files(tmp_path):
    facts = probe(tree(tmp_path, JETSON))
    assert named(facts, "Jetson Linux") == Fact("system", "Jetson Linux", "L4T 36.4.3", "ok")
    assert named(facts, "system").value.startswith("Ubuntu 22.04.5 LTS, ")
    assert named(facts, "board").value == "NVIDIA Jetson Orin Nano Developer Kit"
    assert named(facts, "CPU").value == "ARMv8 Processor rev 1 (v8l), 6 cores"
    assert named(facts, "governor").value == "powersave, schedutil"
    assert named(facts, "governor").fix == "sudo jetson_clocks"
    assert named(facts, "memory").value == "7.5 GiB, 0.5 GiB available"
    assert named(facts, "memory").status == "warn"
    assert named(facts, "power mode").value == "1 (15W)"
    assert named(facts, "GPU clock").value == "306 MHz of 625 MHz"
    assert named(facts, "temperature").value == "51 °C at the hottest sensor"
    assert named(facts, "NVIDIA GPU").value == "integrated in NVIDIA Jetson Orin Nano Developer Kit"
    assert named(facts, "CUDA").value == "12.6.11 in /usr/local/cuda"
    assert named(facts, "CPU clock").value == "730 MHz at the slowest core, of 1510 MHz"
    assert named(facts, "TensorRT library").value == "10.3.0 of the system"
    elements = named(facts, "GStreamer elements")
    assert elements.status == "warn"
    assert elements.value == "nvarguscamerasrc, v4l2src; without nvvidconv, nvv4l2decoder, rtspsrc, appsink"
    assert elements.fix.endswith("nvidia-l4t-gstreamer nvidia-l4t-camera")
    assert named(facts, "V4L2").value == "/dev/video0 (vi-output, imx219 9-0010), /dev/video10"


def test_a_jetson_with_too_old_a_system_is_warned_about(tmp_path):
    files = {"etc/nv_tegra_release": "# R35 (release), REVISION: 5.0, GCID: 1, BOARD: t186ref\n"}
    fact = named(probe(tree(tmp_path, files)), "Jetson Linux")
    assert fact.status == "warn"
    assert "L4T 35.5.0" in fact.value
    assert "JetPack 6" in fact.value


def test_an_empty_root_is_described_without_guessing(tmp_path):
    facts = probe(tmp_path)
    names = {fact.name for fact in facts}
    assert {"Jetson Linux", "board", "governor", "memory", "power mode", "temperature", "CUDA"}.isdisjoint(names)
    assert named(facts, "NVIDIA GPU").value == "none; models run on the CPU"
    assert named(facts, "V4L2").value.startswith("no /dev/video*")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00garbage", b"pmode: R99 \n" * 1000])
def test_files_with_nonsense_are_ignored(tmp_path, content):
    for name in JETSON:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert probe(tmp_path)


def test_directories_in_place_of_files_are_ignored(tmp_path):
    for name in JETSON:
        (tmp_path / name).mkdir(parents=True)
    assert probe(tmp_path)


def test_driver_files_name_the_gpu(tmp_path):
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    files = {
        "proc/driver/nvidia/version": version,
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA RTX A2000\nIRQ: 1\n",
        "proc/driver/nvidia/gpus/0000:02:00.0/information": "Model: \t\t NVIDIA L4\nIRQ: 1\n",
    }
    gpus = [fact.value for fact in probe(tree(tmp_path, files)) if fact.name == "NVIDIA GPU"]
    assert gpus == ["NVIDIA RTX A2000, driver 550.54.15", "NVIDIA L4, driver 550.54.15"]


def test_the_version_of_the_driver_is_known_with_and_without_its_module(tmp_path):
    assert driver_version(tmp_path) is None
    tree(tmp_path, JETSON)
    assert driver_version(tmp_path) == "L4T 36.4.3"
    module = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n"
    assert driver_version(tree(tmp_path, {"proc/driver/nvidia/version": module})) == "540.4.0"


@pytest.mark.parametrize("files", [{}, JETSON])
def test_what_a_gpu_needs_is_missing_only_where_there_is_one(tmp_path, monkeypatch, files):
    monkeypatch.setenv("MELIAD_EDGE_KERNEL", "off")
    monkeypatch.setattr("meliad_edge.device.probe._installed", lambda package: None)
    facts = probe(tree(tmp_path, files))
    for name in ("TensorRT", "PyCUDA", "TensorRT plugin", "C library"):
        fact = named(facts, name)
        assert fact.value in ("not installed", "not built")
        assert (fact.status, bool(fact.fix), fact.required) == ("missing" if files else "info", bool(files), False)
    if files:
        assert named(facts, "TensorRT").fix == "sudo apt install python3-libnvinfer"


def test_what_a_gpu_needs_is_named_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("meliad_edge.device.probe._installed", {"tensorrt": "10.3.0", "pycuda": "2026.1"}.get)
    monkeypatch.setattr("meliad_edge.device.probe.find_kernel_library", lambda host="": Path(f"/lib/{host}.so"))
    facts = probe(tmp_path)
    values = [named(facts, name).value for name in ("TensorRT", "PyCUDA", "TensorRT plugin", "C library")]
    assert values == ["10.3.0", "2026.1", "/lib/tensorrt.so", "/lib/c.so"]


def test_a_gpu_without_driver_is_a_warning(tmp_path):
    facts = probe(tree(tmp_path, {"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n"}))
    assert named(facts, "NVIDIA GPU").status == "warn"
    assert named(facts, "NVIDIA GPU").fix


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB'", "NVIDIA H100 80GB HBM3, driver 550.54.15, 81559 MiB"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", None),
    ],
)
def test_nvidia_smi_is_asked_and_may_fail(tmp_path, monkeypatch, script, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    values = [fact.value for fact in probe() if fact.name == "NVIDIA GPU"]
    assert (expected in values) if expected else values


def test_a_cuda_compiler_on_the_path_is_cuda(tmp_path, monkeypatch):
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fact = named(probe(), "CUDA")
    assert fact.status == "ok"
    assert fact.value == f"compiler {program}" or fact.value.endswith(" in /usr/local/cuda")
    assert named(probe(tree(tmp_path / "root", JETSON)), "CUDA").value == "12.6.11 in /usr/local/cuda"


def test_every_extra_of_the_runtime_is_looked_for(monkeypatch):
    extras = importlib.metadata.metadata("meliad-edge").get_all("Provides-Extra") or []
    monkeypatch.setattr("meliad_edge.device.probe._installed", lambda package: None)
    fixes = " ".join(fact.fix for fact in probe() if fact.topic == "workshop")
    left_out = {"demo", "dev", "peers", "plot", "tensorrt", "tensorrt-test"}  # TensorRT is under GPU.
    assert {extra for extra in extras if f"[{extra}]" not in fixes} == left_out


def test_two_cv2_wheels_are_warned_about(tmp_path, monkeypatch):
    for name in ("opencv_python", "opencv_python_headless"):
        metadata = tmp_path / f"{name}-4.10.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 4.10.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    fact = named(probe(), "OpenCV")
    assert fact.status == "warn"
    assert "2 wheels" in fact.value
    assert fact.fix.startswith("pip uninstall -y opencv-python opencv-python-headless &&")


@pytest.mark.parametrize(("module", "name"), [("onnxruntime", "ONNX Runtime"), ("cv2", "OpenCV")])
def test_a_broken_required_package_is_missing_not_a_crash(monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    fact = named(probe(), name)
    assert (fact.status, fact.required) == ("missing", True)
    assert fact.fix.startswith("pip install")


def test_looking_never_imports_the_workshop():
    code = (
        "import sys; from meliad_edge.device.probe import probe; probe();"
        "print(*{'torch', 'timm', 'tensorrt', 'onnx', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "\n"


def test_cpu_name_falls_back_to_the_board(tmp_path):
    files = {"proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.5\n", "proc/device-tree/model": "Some Board\0"}
    assert cpu_name(tree(tmp_path, files)) == "Some Board"
    assert cpu_name(Path("/"))
