"""``score`` over a bare loop: what it costs, what a second worker brings, and whether memory depends on the images."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.limit import FRAME_HW, SIZE
from meliad_edge.benchmarks.sample_model import sample_bundle, sample_model
from meliad_edge.cli.output import say
from meliad_edge.errors import UsageError
from meliad_edge.precision import Precision

_COMMAND = "from meliad_edge.cli import main; main()"
# Nothing but what must be: read, decode, score.
_BARE = """\
import sys
from pathlib import Path
import cv2
from meliad_edge.data.images import read_image
from meliad_edge.runtime.load import load_predictor
cv2.setNumThreads(1)
predictor = load_predictor(Path(sys.argv[1]), threads=1)
anomalies = 0
for path in sorted(Path(sys.argv[2]).iterdir()):
    anomalies += predictor.predict(read_image(path)).is_anomaly
print(anomalies)
"""
_PICTURES = 64
_FEWER = 10
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """One process and all that it started.

    Attributes:
        seconds: Wall time.
        core_seconds: Processor time of all its processes.
        peak_mb: Largest resident memory of its largest process, in MB of 2^20 bytes.
    """

    seconds: float
    core_seconds: float
    peak_mb: float


def run(images: int = 10_000, precision: Precision = "fp32", ray: bool = False) -> dict[str, Any]:
    """Score an archive of JPEGs of 640 x 480 pixels with one worker and with two, a bare loop before and after.

    Args:
        images: In the archive; a tenth of them is scored too, for the memory.
        precision: Of the model.
        ray: Score on a Ray cluster of this machine as well.

    Returns:
        JSON values: by name of the run what :class:`Run` says; ``over_bare``, wall time of one worker over the mean of
        the two bare loops; ``two_over_one``, images per second of two workers over those of one, and
        ``per_core_second``, the same of images per second of processor time.

    Raises:
        UsageError: A run fails.
    """
    model = sample_model(SIZE)
    with tempfile.TemporaryDirectory(prefix="meliad-archive-") as name:
        folder = Path(name)
        precisions: tuple[Precision, ...] = ("fp32",) if precision == "fp32" else ("fp32", precision)
        bundle = sample_bundle(model, folder / "sample.meliad", precisions).path
        pictures = folder / "pictures"
        pictures.mkdir()
        for index, frame in enumerate(model.frames[:_PICTURES]):
            cv2.imwrite(
                str(pictures / f"{index}.jpg"), cv2.cvtColor(cv2.resize(frame, FRAME_HW[::-1]), cv2.COLOR_RGB2BGR)
            )
        many = _link(sorted(pictures.iterdir()), folder / "many", images)
        few = _link(sorted(pictures.iterdir()), folder / "few", max(1, images // _FEWER))
        plan = {
            "bare": (_BARE, str(bundle), str(many)),
            "one": _score(bundle, many, folder / "one", "--workers", "1"),
            "bare_again": (_BARE, str(bundle), str(many)),
            "two": _score(bundle, many, folder / "two", "--workers", "2"),
            "one_few": _score(bundle, few, folder / "one-few", "--workers", "1"),
        }
        if ray:
            plan["ray_two"] = _score(bundle, many, folder / "ray", "--workers", "2", "--ray", "local")
        runs = {}
        for key, command in plan.items():
            runs[key] = _measure(command)
            say(key.replace("_", " "), f"{runs[key].seconds:.1f} s")
    bare_s = 0.5 * (runs["bare"].seconds + runs["bare_again"].seconds)
    return {
        "benchmark": "archive",
        "images": images,
        "precision": precision,
        "data": model.data,
        "runs": {key: asdict(one) for key, one in runs.items()},
        "over_bare": runs["one"].seconds / bare_s,
        "two_over_one": runs["one"].seconds / runs["two"].seconds,
        "per_core_second": runs["one"].core_seconds / runs["two"].core_seconds,
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    runs, images = result["runs"], result["images"]
    lines = [
        ("overhead", f"{result['over_bare']:.3f} x a bare loop over {images:,} images"),
        (
            "workers",
            f"two score {result['two_over_one']:.2f} x as many as one, {result['per_core_second']:.2f} x per core",
        ),
        (
            "memory",
            f"largest process {runs['one']['peak_mb']:.0f} MB with {images:,} images, "
            f"{runs['one_few']['peak_mb']:.0f} MB with {images // _FEWER:,}",
        ),
    ]
    lines += [
        (key.replace("_", " "), f"{images / one['seconds']:.1f} images/s")
        for key, one in runs.items()
        if "few" not in key
    ]
    return lines


def _link(pictures: Sequence[Path], folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        os.link(pictures[index % len(pictures)], folder / f"{index:07d}.jpg")
    return folder


def _score(bundle: Path, archive: Path, out: Path, *options: str) -> tuple[str, ...]:
    return (_COMMAND, "score", str(bundle), str(archive), "--out", str(out), "--worst", "0", *options)


def _measure(command: Sequence[str]) -> Run:
    before = os.times()
    start_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda pipe: said.append(pipe.read()), args=(process.stderr,))
    reader.start()
    peak_kb = 0
    while process.poll() is None:
        peak_kb = max(peak_kb, *map(_peak_kb, _family(process.pid)))
        time.sleep(_POLL_S)
    seconds = time.perf_counter() - start_s
    reader.join()
    process.stderr.close()
    after = os.times()
    if process.returncode != 0:
        msg = f"{command[1:]}: ended with {process.returncode} ({said[0].strip()[-300:]})"
        raise UsageError(msg)
    cores = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(seconds, cores, peak_kb / 1024)


def _family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []  # it has ended
    return [pid, *(each for child in children for each in _family(int(child)))]


def _peak_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
