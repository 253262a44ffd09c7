"""Whether a camera shows parts as it should: frozen, black, overexposed, blurred or moved; kept apart from anomalies.

What is certain at a glance, no light or nothing but light, makes a camera unfit at once: such pictures say nothing of a
part. Blur and a moved camera are judged over seconds against what the same camera showed first, and never make it
unfit: a false alarm there must not silence a defect.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.stream.frames import Frame

CONDITIONS = ("frozen", "black", "overexposed", "blurred", "moved")
_GLANCE = 64  # Pixels per side of what every frame is judged by.
_SMALL_WIDTH = 160
_ECC_BLUR = 5
# Of the absolute value of a normal distribution with standard deviation 1.
_MEDIAN_OF_ABSOLUTE = 0.6745
# Pixels that deviate by more, in the median, belong to what moves; so much of a picture must stand still.
_STILL_LEVELS, _SMALLEST_STILL = 8.0, 0.1
_SHORTEST_ROW = 32
# Detail that noise does not drown.
_SMALLEST_DETAIL = 0.5


@dataclass(frozen=True, slots=True)
class ConditionLimits:
    """When something is wrong with a camera; levels are those of the green channel, 0 to 255.

    Attributes:
        frozen_s: The very same picture for so long. A camera's noise changes every picture, but a lossy stream of a
            scene in which nothing moves may repeat one until its next key frame.
        black_level: Nearly every pixel is at or below this.
        white_level, white_share: So many pixels are at or above that, unless the camera's own pictures are like it.
        lasting_s: How long black, white, or their absence must last to be told.
        look_every_s: From one look at sharpness and place to the next.
        learning_looks: Looks from which the camera's own sharpness and place are learned.
        deciding_looks: Looks that must agree on blur, or are put together to one picture without moving parts.
        blurred_share: Fine detail, over what the camera showed first, below which it is blurred.
        alike: Correlation of edges with the camera's first pictures below which it may have moved.
        found_again: Correlation that must come back once a movement is undone, or the scene is another one.
        gained: What undoing it must add to the correlation.
        moved_share: Displacement over the width of the picture that counts.
    """

    frozen_s: float = 10.0
    black_level: float = 16.0
    white_level: float = 250.0
    white_share: float = 0.7
    lasting_s: float = 1.0
    look_every_s: float = 0.5
    learning_looks: int = 40
    deciding_looks: int = 10
    blurred_share: float = 0.5
    alike: float = 0.95
    found_again: float = 0.8
    gained: float = 0.03
    moved_share: float = 0.015


class ConditionMonitor:
    """Judges one camera by its frames; takes some hundredths of a millisecond for most of them.

    Args:
        limits: When something is wrong.
    """

    def __init__(self, limits: ConditionLimits | None = None) -> None:
        self._limits = limits or ConditionLimits()
        self._light = _Light(self._limits)
        self._stillness = _Stillness(self._limits)
        self._sharpness = _Sharpness(self._limits)
        self._place = _Place(self._limits)
        self._look_due_s = -np.inf
        self._seen = "", ""  # By the latest looks.
        self._lasting = _Lasting(self._limits.lasting_s)
        self._is_fit = True

    @property
    def is_fit(self) -> bool:
        """Whether what the camera shows now may be judged at all."""
        return self._is_fit

    def update(self, frame: Frame) -> tuple[str, str]:
        """Take in a frame; returns the condition in one word, ``""`` when all is well, and in one sentence."""
        glance = _glance(frame.image)
        now_s = frame.captured_s
        frozen, light = self._stillness.update(glance, now_s), self._light.update(glance)
        self._is_fit = not (frozen[0] or light[0])
        if self._is_fit and now_s >= self._look_due_s:
            self._look_due_s = now_s + self._limits.look_every_s
            self._light.learn(glance)
            blurred = self._sharpness.update(frame.image)
            moved = self._place.update(frame.image)
            self._seen = blurred if blurred[0] else moved
        told = self._lasting.update(light, now_s)
        return next((condition for condition in (frozen, told, self._seen) if condition[0]), ("", ""))


class _Lasting:
    """Passes on what lasts, and what is gone for as long."""

    def __init__(self, lasting_s: float) -> None:
        self._lasting_s = lasting_s
        self._told = self._candidate = "", ""
        self._since_s = 0.0

    def update(self, seen: tuple[str, str], now_s: float) -> tuple[str, str]:
        if seen[0] != self._candidate[0]:
            self._candidate, self._since_s = seen, now_s
        if now_s - self._since_s >= self._lasting_s and self._told[0] != self._candidate[0]:
            self._told = self._candidate
        return self._told


class _Light:
    """No light at all, or nothing but light."""

    def __init__(self, limits: ConditionLimits) -> None:
        self._limits = limits
        self._usual_white = 0.0
        self._learned = 0

    def learn(self, glance: NDArray[np.uint8]) -> None:
        """Take in a picture that is not known to be bad: a white ground is no fault."""
        if self._learned < self._limits.learning_looks:
            self._learned += 1
            share = _share_at_or_above(glance, self._limits.white_level)
            self._usual_white += (share - self._usual_white) / self._learned

    def update(self, glance: NDArray[np.uint8]) -> tuple[str, str]:
        """The condition of one picture."""
        limits = self._limits
        # Half a percent: hot pixels, or the letters that a camera writes into its picture.
        if np.count_nonzero(glance > limits.black_level) <= glance.size // 200:
            level = float(np.median(glance))
            return "black", f"the picture is dark, {level:.0f} of 255: is the lens covered, is the light on?"
        white = _share_at_or_above(glance, limits.white_level)
        if white >= min(0.98, self._usual_white + limits.white_share):
            return "overexposed", f"{white:.0%} of the picture is white: check exposure and light"
        return "", ""


class _Stillness:
    """The very same picture again and again."""

    def __init__(self, limits: ConditionLimits) -> None:
        self._limits = limits
        self._digest: int | None = None
        self._since_s = 0.0

    def update(self, glance: NDArray[np.uint8], now_s: float) -> tuple[str, str]:
        digest = zlib.crc32(glance.tobytes())
        if digest != self._digest:
            self._digest, self._since_s = digest, now_s
        still_s = now_s - self._since_s
        if still_s < self._limits.frozen_s:
            return "", ""
        return "frozen", f"the very same picture for {self._limits.frozen_s:g} s: restart the camera"


@dataclass(slots=True)
class _Sharpness:
    """Fine detail against what the camera showed first.

    Detail is the contrast of neighbouring pixels over that of pixels eight apart, both without the noise of the camera,
    so that neither light nor contrast changes it. Where a scene has none, blur cannot be seen.
    """

    limits: ConditionLimits
    learned: list[tuple[float, float]] = field(default_factory=list)
    usual: float | None = None
    recent: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.recent = deque(maxlen=self.limits.deciding_looks)

    def update(self, image: NDArray[np.uint8]) -> tuple[str, str]:
        detail, noise = _detail_and_noise(image)
        if self.usual is None:
            self.learned.append((detail, noise))
            if len(self.learned) >= self.limits.learning_looks:
                details, noises = np.transpose(self.learned)
                usual = float(np.quantile(details, 0.25))
                self.usual = usual if usual > _SMALLEST_DETAIL * float(np.median(noises)) else 0.0
            return "", ""
        if self.usual == 0.0:
            return "", ""  # This camera shows nothing that blur would take away.
        self.recent.append(detail)
        share = max(self.recent) / self.usual  # Every look must agree.
        if len(self.recent) < self.limits.deciding_looks or share >= self.limits.blurred_share:
            return "", ""
        return "blurred", f"fine detail is {share:.0%} of what this camera showed at first: focus it, clean the lens"


class _Place:
    """The scene's still parts against where they were at first."""

    def __init__(self, limits: ConditionLimits) -> None:
        self._limits = limits
        self._first: list[NDArray[np.uint8]] = []
        self._recent: deque[NDArray[np.uint8]] = deque(maxlen=limits.deciding_looks)
        self._reference: NDArray[np.float32] | None = None
        self._still = np.zeros((1, 1), np.uint8)  # 1 where the first pictures agreed.
        self._usual = 0.0  # Correlation of the camera's own first pictures with each other.
        self._looks = 0
        self._seen = "", ""
        self._moved: float | None = None  # By how much, at the look before.

    def update(self, image: NDArray[np.uint8]) -> tuple[str, str]:
        small = _small(image)
        if self._reference is not None and self._reference.shape != small.shape:
            self._first.clear()  # Another resolution: what was learned says nothing.
            self._recent.clear()
            self._reference, self._seen = None, ("", "")
        if self._reference is None:
            if self._first and self._first[0].shape != small.shape:
                self._first.clear()
            self._first.append(small)
            if len(self._first) >= self._limits.learning_looks:
                self._learn()
            return "", ""
        self._recent.append(small)
        self._looks += 1
        if len(self._recent) == self._limits.deciding_looks and self._looks % self._limits.deciding_looks == 0:
            self._seen = self._judge(self._reference)
        return self._seen

    def _learn(self) -> None:
        """The median of the first pictures has no moving parts; its halves tell how alike such medians are."""
        middle = len(self._first) // 2
        early, late = (_edges(_median(part)) for part in (self._first[:middle], self._first[middle:]))
        median = _median(self._first)
        deviation = np.median(np.abs(np.stack(self._first) - median), axis=0)
        still = (deviation <= _STILL_LEVELS).astype(np.uint8)
        self._still = np.asarray(cv2.erode(still, np.ones((5, 5), np.uint8)), dtype=np.uint8)
        self._usual = _correlation(early, late, self._still)
        self._reference = _edges(median)
        self._first.clear()

    def _judge(self, reference: NDArray[np.float32]) -> tuple[str, str]:
        limits = self._limits
        if self._usual < limits.found_again or self._still.mean() < _SMALLEST_STILL:
            return "", ""  # Nothing to hold on to stands still here.
        now = _edges(_median(self._recent))
        alike = _correlation(reference, now, self._still)
        if alike >= limits.alike * self._usual:
            return "", ""
        moved = _find_movement(reference, now, self._still)
        before, self._moved = self._moved, None
        if moved is None:
            return self._seen
        correlation, shift, turn = moved
        if correlation < max(limits.found_again, alike + limits.gained) or shift < limits.moved_share:
            return self._seen  # Once moved, it is so until the first pictures are back.
        # Parts that pass are laid over one another in ever new ways; a camera stays where it was put.
        self._moved = shift
        if before is None or abs(before - shift) > 0.5 * limits.moved_share:
            return self._seen
        return (
            "moved",
            f"the camera has moved by {shift:.1%} of the picture's width, turned by {turn:.1f} degrees: "
            "put it back, or set regions and threshold anew",
        )


def _glance(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every so many-th pixel's green, contiguous, about 64 x 64."""
    steps = [max(1, side // _GLANCE) for side in image.shape[:2]]
    return np.ascontiguousarray(image[:: steps[0], :: steps[1], 1])


def _share_at_or_above(glance: NDArray[np.uint8], level: float) -> float:
    return float(np.count_nonzero(glance >= level)) / glance.size


def _detail_and_noise(image: NDArray[np.uint8]) -> tuple[float, float]:
    """Contrast of neighbours over that of pixels eight apart, along rows, and what noise alone would make of it."""
    if image.shape[1] < _SHORTEST_ROW:
        return 0.0, 0.0
    rows = image[:: max(1, image.shape[0] // 60), :, 1].astype(np.float32)
    near, far = rows[:, 1:] - rows[:, :-1], rows[:, 8:] - rows[:, :-8]
    # Most places of a picture are flat at this scale: the median of the second difference is noise.
    second = near[:, 1:] - near[:, :-1]
    variance = (float(np.median(np.abs(second))) / _MEDIAN_OF_ABSOLUTE) ** 2 / 6.0
    contrast = max(float(np.mean(far * far)) - 2.0 * variance, 1.0)
    return max(float(np.mean(near * near)) - 2.0 * variance, 0.0) / contrast, 2.0 * variance / contrast


def _small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    size = _SMALL_WIDTH, max(16, round(height * _SMALL_WIDTH / width))
    step = max(1, width // (4 * _SMALL_WIDTH))  # Averaging four pixels a side is enough.
    return np.asarray(cv2.resize(image[::step, ::step, 1], size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _median(pictures: list[NDArray[np.uint8]] | deque[NDArray[np.uint8]]) -> NDArray[np.float32]:
    return np.asarray(np.median(np.stack(pictures), axis=0), dtype=np.float32)


def _edges(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Strength of edges; its square root, so that few strong ones do not decide alone."""
    smooth = cv2.GaussianBlur(picture, (0, 0), 1.0)
    strength = np.sqrt(np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)))
    return np.asarray(strength, dtype=np.float32)


def _correlation(first: NDArray[np.float32], second: NDArray[np.float32], still: NDArray[np.uint8]) -> float:
    a, b = first[still != 0], second[still != 0]
    if not a.size:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale > 0.0 else 0.0


def _find_movement(
    reference: NDArray[np.float32], now: NDArray[np.float32], still: NDArray[np.uint8]
) -> tuple[float, float, float] | None:
    """Shift and rotation that lay one picture over the other.

    Returns:
        Correlation with the movement undone, largest displacement of a corner over the width, rotation in degrees;
        None where none is found.
    """
    height, width = reference.shape
    window = cv2.createHanningWindow((width, height), cv2.CV_32F)
    # Copies: where the size suits its Fourier transform, OpenCV multiplies the window into what it was given.
    (x, y), _ = cv2.phaseCorrelate(reference.copy(), now.copy(), window)
    warp = np.array([[1, 0, x], [0, 1, y]], np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-4)
    try:
        correlation, moved = cv2.findTransformECC(
            reference, now, warp, cv2.MOTION_EUCLIDEAN, criteria, still, _ECC_BLUR
        )
    except cv2.error:  # It does not converge: these are different scenes.
        return None
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], np.float64)
    undone = np.asarray(moved, np.float64)
    displacement = corners @ undone.T - corners[:, :2]
    turn = float(np.degrees(np.arctan2(undone[1, 0], undone[0, 0])))
    return float(correlation), float(np.linalg.norm(displacement, axis=1).max()) / width, turn
