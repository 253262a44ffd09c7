"""How often the condition of a camera is recognised, how often it is seen where there is none, and what it costs.

Scenes are made of real pictures: a photo that stands still, a belt with another photo's ground that runs across it, and
parts on it, with the noise, compression and change of light of a camera. Each is shown until the monitor has learned
it, and then with one thing wrong, or with something that happens on a good day. Real videos are shown as they are.
The limits were chosen on the development scenes, and on twenty scenes of the held-out pictures that are not shown here.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.data.images import IMAGE_SUFFIXES, read_image
from meliad_edge.errors import DataError
from meliad_edge.monitor.condition import ConditionLimits, ConditionMonitor
from meliad_edge.progress import track
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.watcher import CameraMonitor

_HW = (720, 1280)
# Frames of every case, and from one to the next: looks are not more frequent, and no two are in step with the belt.
_SHOWN_FRAMES, _FRAME_GAP_S = 60, (1.25, 1.75)
_COST_FRAMES, _COST_FPS = 2000, 25.0
_LEARNING = "while learning"
_DEVELOPMENT = ("magnetic_tile", "aws_cookies")
_HELD_OUT = ("elpv", "videos")
_FIRST_SEED = {"development": 0, "held out": 1000}

_Image = NDArray[np.uint8]
_Change = Callable[[_Image, int], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Case:
    """Something that happens to a camera.

    Attributes:
        condition: What should be reported, ``""`` for nothing.
        change: Takes a picture and how many came before since it happened.
        runs: Whether the belt runs meanwhile.
    """

    condition: str
    change: _Change
    runs: bool = True


@dataclass(slots=True)
class _Said:
    """What a monitor said of one thing that happened.

    Attributes:
        words: How many scenes it was reported in, by condition; ``""`` stands for none.
        unfit_frames: Frames in which the camera was unfit, of all scenes.
        frames: All frames.
    """

    words: dict[str, int] = field(default_factory=dict)
    unfit_frames: int = 0
    frames: int = 0

    def watch(self, pictures: Iterable[tuple[float, _Image]], monitor: CameraMonitor) -> None:
        """Show pictures, each with its capture time, to a monitor."""
        words = set()
        for number, (at_s, image) in enumerate(pictures):
            words.add(monitor.update(Frame("belt", number, at_s, image, 0.0))[0])
            self.unfit_frames += not monitor.is_fit
            self.frames += 1
        for word in words - {""} or {""}:
            self.words[word] = self.words.get(word, 0) + 1

    def describe(self) -> str:
        """In one line."""
        words = ", ".join(f"{word or 'nothing'} {count}" for word, count in sorted(self.words.items()))
        return f"reported {words}; unfit {self.unfit_frames} of {self.frames} frames"


class _Scene:
    """A belt with parts in front of a still background.

    Args:
        photos: Real pictures; one is the background, others are parts.
        rng: Chooses everything about it.
    """

    def __init__(self, photos: Sequence[_Image], rng: np.random.Generator) -> None:
        self._rng = rng
        height, width = _HW
        chosen = [photos[index] for index in rng.choice(len(photos), 6, replace=False)]
        self._background = cv2.resize(chosen[0], (width, height), interpolation=cv2.INTER_CUBIC)
        self._top, self._bottom = int(rng.uniform(0.1, 0.35) * height), int(rng.uniform(0.65, 0.9) * height)
        side = self._bottom - self._top
        belt = cv2.GaussianBlur(cv2.resize(chosen[1], (side, side)), (0, 0), 8)
        belt = np.concatenate([belt, belt[:, ::-1]] * (2 + width // side), axis=1)
        self._belt = np.clip(belt * rng.uniform(0.3, 1.0) + rng.normal(0, 6, belt.shape[:2])[..., None], 0, 255)
        self._parts = [cv2.resize(photo, (side * 3 // 4, side * 3 // 4)) for photo in chosen[2:]]
        self._spacing = int(side * rng.uniform(0.9, 2.5))
        self._speed = rng.uniform(60, 400)  # Pixels per second.
        self._noise = [rng.normal(0, rng.uniform(1, 4), (height, width, 1)).astype(np.float32) for _ in range(4)]
        self._quality = int(rng.integers(50, 96))
        self._light_period_s = rng.uniform(60, 600)
        self._light = rng.uniform(0.05, 0.2)
        self._has_date = rng.random() < 0.5

    def picture(self, belt_s: float, now_s: float) -> _Image:
        """What a perfect camera sees, float levels as uint8, RGB [720, 1280, 3]."""
        picture = self._background.copy()
        travelled = int(self._speed * belt_s)
        period = 2 * (self._bottom - self._top)
        width = _HW[1]
        start = travelled % period
        picture[self._top : self._bottom] = self._belt[:, start : start + width]
        size = self._parts[0].shape[0]
        first = travelled // self._spacing
        for number in range(first - 1, first + width // self._spacing + 2):
            left = number * self._spacing - travelled
            part = self._parts[number % len(self._parts)][:, max(0, -left) : max(0, width - left)]
            if part.shape[1] > 0 and left + size > 0:
                y, x = self._top + size // 8, max(0, left)
                picture[y : y + size, x : x + part.shape[1]] = part
        light = 1.0 + self._light * np.sin(2 * np.pi * now_s / self._light_period_s)
        return np.asarray(cv2.convertScaleAbs(picture, alpha=light), dtype=np.uint8)

    def sensed(self, picture: NDArray[Any]) -> _Image:
        """The picture with the camera's noise, in half of the scenes with the date, compressed."""
        noise = np.roll(self._noise[self._rng.integers(4)], tuple(self._rng.integers(0, 700, 2)), axis=(0, 1))
        noisy = np.clip(picture + noise, 0, 255).astype(np.uint8)
        if self._has_date:
            cv2.putText(noisy, "2026-11-26 12:03  CAMERA 3", (24, 44), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (255,) * 3, 2)
        _, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, self._quality])
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), dtype=np.uint8)


def cases() -> dict[str, _Case]:
    """What happens, by name."""
    return {
        "nothing": _Case("", lambda image, number: image),
        "belt stands still": _Case("", lambda image, number: image, runs=False),
        "one flash": _Case("", lambda image, number: np.full_like(image, 255) if number == 20 else image),
        "light -20 %": _Case("", lambda image, number: cv2.convertScaleAbs(image, alpha=0.8)),
        "light +20 %": _Case("", lambda image, number: cv2.convertScaleAbs(image, alpha=1.2)),
        "gamma 1.3": _Case("", lambda image, number: (255 * (image / 255.0) ** 1.3).astype(np.uint8)),
        "JPEG quality 30": _Case("", _compress),
        "shaking, 2 pixels": _Case("", lambda image, number: _move(image, 2.0 * (-1) ** number, 0.0)),
        "covered": _Case("black", lambda image, number: (image * 0.02).astype(np.uint8)),
        "exposure x 8": _Case("overexposed", lambda image, number: cv2.convertScaleAbs(image, alpha=8, beta=60)),
        "blur 2 pixels": _Case("blurred", lambda image, number: cv2.GaussianBlur(image, (0, 0), 2)),
        "blur 4 pixels": _Case("blurred", lambda image, number: cv2.GaussianBlur(image, (0, 0), 4)),
        "defocus, radius 8": _Case("blurred", lambda image, number: _defocus(image, 8)),
        "shift 2 %": _Case("moved", lambda image, number: _move(image, 0.02 * image.shape[1], 0.0)),
        "shift 5 %": _Case("moved", lambda image, number: _move(image, 0.05 * image.shape[1], 0.0)),
        "turn 1.5 degrees": _Case("moved", lambda image, number: _move(image, 0.0, 1.5)),
        "turn 3 degrees": _Case("moved", lambda image, number: _move(image, 0.0, 3.0)),
    }


def run(
    scenes: int,
    data_folder: Path,
    *,
    make_monitor: Callable[[], CameraMonitor] = ConditionMonitor,
    groups: Sequence[str] = ("development", "held out"),
) -> dict[str, Any]:
    """Show every case to every scene.

    Args:
        scenes: Of each group.
        data_folder: Where the folders ``magnetic_tile``, ``aws_cookies`` and ``videos`` are.
        make_monitor: Makes what is judged.
        groups: ``development``, ``held out``.

    Returns:
        JSON values: by group and case in how many scenes what was reported, and in how many frames the camera was
        unfit; cost per frame in milliseconds.

    Raises:
        DataError: There are no pictures.
    """
    sources = {"development": _DEVELOPMENT, "held out": _HELD_OUT}
    said: dict[str, dict[str, _Said]] = {}
    for group in groups:
        photos = _photos(sources[group], data_folder)
        said[group] = {name: _Said() for name in (_LEARNING, *cases())}
        for seed in track(range(scenes), group):
            rng = np.random.default_rng(_FIRST_SEED[group] + seed)
            _show(_Scene(photos, rng), rng, make_monitor(), said[group])
    if "held out" in groups:
        said["videos"] = {}
        for video in sorted((data_folder / "videos").glob("*.mp4")):
            said["videos"][video.stem] = _Said()
            _show_video(video, make_monitor(), said["videos"][video.stem])
    return {
        "benchmark": "health",
        "scenes": scenes,
        "said": {group: {name: asdict(entry) for name, entry in entries.items()} for group, entries in said.items()},
        "cost_ms": _cost_ms(make_monitor()),
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    expected = {name: case.condition or "nothing" for name, case in cases().items()}
    lines = [
        (group, f"{name:18} expected {expected.get(name, 'nothing'):12} {_Said(**entry).describe()}")
        for group, entries in result["said"].items()
        for name, entry in entries.items()
    ]
    cost = result["cost_ms"]
    figures = f"median {cost['median']:.3f}, longest {cost['longest']:.1f}"
    return [*lines, ("cost", f"{cost['mean']:.3f} ms per 1280x720 frame at 25 fps, {figures}")]


def _show(scene: _Scene, rng: np.random.Generator, monitor: CameraMonitor, said: dict[str, _Said]) -> None:
    """Let the monitor learn a scene, then let everything happen to it, each time as if nothing had happened before."""
    learning_frames = ConditionLimits().learning_looks + 20
    times_s = np.cumsum(rng.uniform(*_FRAME_GAP_S, learning_frames + _SHOWN_FRAMES)).tolist()
    first_s = times_s[:learning_frames]
    said[_LEARNING].watch(((at_s, scene.sensed(scene.picture(at_s, at_s))) for at_s in first_s), monitor)
    for name, case in cases().items():
        then_s = times_s[learning_frames:]
        pictures = (
            case.change(scene.picture(at_s if case.runs else then_s[0], at_s), number)
            for number, at_s in enumerate(then_s)
        )
        said[name].watch(zip(then_s, map(scene.sensed, pictures), strict=True), copy.deepcopy(monitor))


def _show_video(video: Path, monitor: CameraMonitor, said: _Said) -> None:
    """Show a video over and over again for three minutes, as a camera would."""
    capture = cv2.VideoCapture(str(video))
    fps = capture.get(cv2.CAP_PROP_FPS)

    def frames() -> Iterator[tuple[float, _Image]]:
        for number in range(int(180 * fps)):
            good, image = capture.read()
            if not good:
                capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
                good, image = capture.read()
            yield number / fps, np.asarray(image, dtype=np.uint8)

    said.watch(frames(), monitor)


def _cost_ms(monitor: CameraMonitor) -> dict[str, float]:
    rng = np.random.default_rng(0)
    photo = cv2.resize(rng.integers(0, 256, (45, 80, 3), dtype=np.uint8), _HW[::-1], interpolation=cv2.INTER_CUBIC)
    images = [np.clip(photo + rng.normal(0, 2, photo.shape), 0, 255).astype(np.uint8) for _ in range(12)]
    taken_ms = []
    for number in range(_COST_FRAMES + 2000):
        frame = Frame("belt", number, number / _COST_FPS, images[number % len(images)], 0.0)
        start = time.perf_counter()
        monitor.update(frame)
        taken_ms.append(1e3 * (time.perf_counter() - start))
    learned = taken_ms[-_COST_FRAMES:]
    return {"mean": statistics.mean(learned), "median": statistics.median(learned), "longest": max(learned)}


def _photos(names: Sequence[str], data_folder: Path) -> list[_Image]:
    photos = []
    for name in names:
        if name == "videos":
            photos += [frame for video in sorted((data_folder / name).glob("*.mp4")) for frame in _stills(video)]
            continue
        folder = _elpv_folder() if name == "elpv" else data_folder / name
        files = sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES
            and "mask" not in file.parent.name
            and not (name == "magnetic_tile" and file.suffix == ".png")
        )
        photos += [read_image(file) for file in files[:: max(1, len(files) // 60)]]
    if len(photos) < 6:
        msg = f"{data_folder}: needs pictures of {', '.join(names)}; found {len(photos)}"
        raise DataError(msg)
    return photos


def _elpv_folder() -> Path:
    import elpv_dataset

    return Path(elpv_dataset.__file__).parent / "data" / "images"


def _stills(video: Path) -> list[_Image]:
    capture = cv2.VideoCapture(str(video))
    stills = []
    for position in range(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 40):
        capture.set(cv2.CAP_PROP_POS_FRAMES, position)
        good, image = capture.read()
        if good:
            stills.append(np.asarray(image, dtype=np.uint8))
    return stills


def _compress(image: _Image, number: int) -> _Image:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), dtype=np.uint8)


def _defocus(image: _Image, radius: int) -> _Image:
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)).astype(np.float32)
    return np.asarray(cv2.filter2D(image, -1, disc / disc.sum()), dtype=np.uint8)


def _move(image: _Image, right: float, turn_deg: float) -> _Image:
    height, width = image.shape[:2]
    transform = cv2.getRotationMatrix2D((width / 2, height / 2), turn_deg, 1.0)
    transform[0, 2] += right
    return np.asarray(cv2.warpAffine(image, transform, (width, height), borderMode=cv2.BORDER_REFLECT), dtype=np.uint8)
