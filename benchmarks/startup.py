"""What comes before the first frame: time of ``--help``, of imports, and the memory of ``watch``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.limit import FRAME_HW, SIZE
from meliad_edge.benchmarks.sample_model import sample_bundle, sample_model, write_video
from meliad_edge.errors import UsageError
from meliad_edge.progress import track
from meliad_edge.runtime.kernel_library import find_kernel_library

_RUNS = 9
_FRAMES = 200
_COMMAND = "from meliad_edge.cli import main; main()"
# Of the program alone: what the system tells its parent includes what that had before.
_PEAK = """\
import atexit, re, sys
def _say_peak():
    with open("/proc/self/status") as file:
        print("peak kB", re.search(r"VmHWM:\\s*(\\d+)", file.read())[1], file=sys.stderr)
atexit.register(_say_peak)
"""
# The libraries alone; then with a session of the same graph that scores the same video.
_LIBRARIES = "import cv2, numpy, onnxruntime"
_BARE = """\
import sys, cv2, numpy, onnxruntime
options = onnxruntime.SessionOptions()
if sys.argv[3]:
    options.register_custom_ops_library(sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
video = cv2.VideoCapture(sys.argv[2])
while True:
    good, frame = video.read()
    if not good:
        break
    frame = cv2.resize(frame, tuple(session.get_inputs()[0].shape[2:0:-1]))
    session.run(None, {session.get_inputs()[0].name: frame[None]})
"""
_IMPORT = """\
import time, cv2, numpy, onnxruntime
start = time.perf_counter()
import meliad_edge.runtime.load, meliad_edge.stream.watcher
print(time.perf_counter() - start)
"""


def run(runs: int = _RUNS) -> dict[str, Any]:
    """Measure in processes of their own, in turn.

    Args:
        runs: Of each; medians are reported.

    Returns:
        JSON values: ``help_s``, wall time of ``meliad-edge --help``, and ``python_s`` of an empty program;
        ``import_s``, what the runtime and the watcher add to the import of ONNX Runtime and OpenCV; peak resident
        memory, in MB of 2^20 bytes, of ``watch`` over a video, ``watch_mb``, of a bare loop that decodes, resizes and
        scores the same video with the same graph, ``bare_mb``, and of the libraries imported, ``libraries_mb``.

    Raises:
        UsageError: A process fails.
    """
    model = sample_model(SIZE)
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="meliad-startup-") as name:
        folder = Path(name)
        bundle = sample_bundle(model, folder / "sample.meliad", ("fp32",))
        graph = folder / "model.onnx"
        graph.write_bytes(bundle.models["fp32"])
        frames = [cv2.resize(frame, FRAME_HW[::-1]) for frame in model.frames]
        video = write_video([frames[index % len(frames)] for index in range(_FRAMES)], folder / "video.avi")
        operands = (str(graph), str(video), str(find_kernel_library() or ""))
        watch = ("watch", str(bundle.path), str(video), "--out", str(folder / "events"))
        for _ in track(range(runs), "runs"):
            taken = {
                "python_s": _process("")[0],
                "help_s": _process(_COMMAND, "--help")[0],
                "import_s": float(_process(_IMPORT)[2]),
                "libraries_mb": _process(_LIBRARIES)[1],
                "bare_mb": _process(_BARE, *operands)[1],
                "watch_mb": _process(_COMMAND, *watch)[1],
            }
            for key, value in taken.items():
                samples.setdefault(key, []).append(value)
    medians = {key: statistics.median(values) for key, values in samples.items()}
    return {
        "benchmark": "startup",
        "runs": runs,
        **medians,
        "watch_beyond_libraries_mb": medians["watch_mb"] - medians["libraries_mb"],
        "watch_beyond_bare_mb": medians["watch_mb"] - medians["bare_mb"],
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    return [
        ("help", f"{result['help_s']:.2f} s   of which Python takes {result['python_s']:.2f} s"),
        ("import", f"{result['import_s']:.3f} s   beyond ONNX Runtime and OpenCV"),
        (
            "watch",
            f"{result['watch_mb']:.0f} MB   {result['watch_beyond_libraries_mb']:.0f} MB beyond the libraries, "
            f"{result['watch_beyond_bare_mb']:.0f} MB beyond a bare loop over the same graph and video",
        ),
    ]


def _process(code: str, *arguments: str) -> tuple[float, float, str]:
    """Wall time in seconds, peak resident memory in MB, and what was written by a program of Python."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _PEAK + code, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    said, _, peak_kb = done.stderr.rpartition("peak kB ")
    if done.returncode != 0 or not peak_kb:
        msg = f"{code.strip()[-60:]!r} {' '.join(arguments)}: ended with {done.returncode} ({said.strip()[-300:]})"
        raise UsageError(msg)
    return seconds, int(peak_kb) / 1024, done.stdout
