"""What is wrong with a camera, kept apart from what is wrong with parts: no light, no new picture, blurred, moved.

Black, white and frozen pictures say nothing of a part, so they make the camera unfit at once, before they are reported.
Blur and movement are judged against what the same camera showed first and never make it unfit: a false alarm there must
not silence a defect. All times are capture times.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meliad_edge.monitor.glance import glance
from meliad_edge.monitor.place import PlaceMonitor
from meliad_edge.monitor.sharpness import SharpnessMonitor
from meliad_edge.stream.frames import Frame

CONDITIONS = ("black", "overexposed", "frozen", "moved", "blurred")
# A dark pause between parts may last so many times as long as the longest of the latest ones.
_BEYOND_USUAL, _KEPT_SPELLS = 3.0, 16
# Share of the picture that is white in an overexposed one of a camera that is not known yet.
_ALL_WHITE = 0.98
# Looks in step with the parts would see a belt stand still, or creep. Multiples of the golden ratio, but for their
# whole part, are spread evenly and never repeat.
_GOLDEN = 0.6180339887498949
# What is usual is learned from a high quantile of what was seen: the white ground, not the parts before it.
_MOSTLY = 0.9


@dataclass(frozen=True, slots=True)
class ConditionLimits:
    """When something is wrong with a camera.

    Attributes:
        black_level: Levels of 255 that a covered lens with its noise stays at or below.
        lit_share: Share of a black picture that may be brighter: hot pixels, the date that a camera writes into it. A
            dark field whose good parts leave less than this in the light needs a smaller one.
        white_level: Levels of 255 from which nothing is told apart.
        white_share: Share of the picture that is white, in all three colours, of an overexposed one; of a camera that
            looks at a white ground, of what is not white usually.
        lasting_s: How long black or white lasts until it is reported, and its absence until that ends.
        longest_pause_s: Where the picture is dark or white between parts, that is reported only when it lasts three
            times as long as such pauses do, but at the latest after this.
        frozen_s: How long the very same picture lasts until it is reported, and the camera unfit. A stream without
            noise repeats its picture while nothing moves; a longer time than those pauses, and than from one key frame
            to the next, keeps them apart.
        look_every_s: From one look at sharpness and place to the next, on average.
        learning_looks: Looks from which both are learned.
        deciding_looks: Looks that must agree on them.
        blurred_ratio: Edges so many times as wide as usual are blurred.
        moved_share: Displacement over the width of the picture that is a movement.
        gone_share: Share of the still background; when less is found, the camera looks elsewhere.
        changed_s: How long blur and movement last, beyond the looks, until they are reported, and their absence.
        gone_s: How long the background is gone until that is reported: something may stand before it for a while.
    """

    black_level: float = 24.0
    lit_share: float = 0.01
    white_level: float = 250.0
    white_share: float = 0.7
    lasting_s: float = 2.0
    longest_pause_s: float = 300.0
    frozen_s: float = 30.0
    look_every_s: float = 1.0
    learning_looks: int = 60
    deciding_looks: int = 10
    blurred_ratio: float = 1.8
    moved_share: float = 0.01
    gone_share: float = 0.1
    changed_s: float = 10.0
    gone_s: float = 60.0


class ConditionMonitor:
    """Judges one camera by its frames; keeps one of them and some small pictures, however long it runs.

    Conditions are ``black``, ``overexposed``, ``frozen``, ``moved`` and ``blurred``; when several hold, the first of
    them is reported. What was learned is forgotten when the size of the frames changes.

    What it cannot tell apart: a frozen camera from a noiseless stream of a scene in which nothing moves; a camera that
    moved from a picture all of which was put elsewhere; and where no edge or nothing still is seen, sharp from blurred
    and moved from not moved.

    Args:
        limits: When something is wrong.
    """

    def __init__(self, limits: ConditionLimits | None = None) -> None:
        self._limits = limits = limits or ConditionLimits()
        self._repeats = _Repeats(limits.look_every_s)
        self._black = _Spell(limits.lasting_s, limits.lasting_s, limits.longest_pause_s)
        self._white = _Spell(limits.lasting_s, limits.lasting_s, limits.longest_pause_s)
        self._frozen = _Spell(limits.frozen_s, limits.lasting_s)
        self._shape: tuple[int, ...] = ()
        self._looks = _Looks(limits)
        self._is_fit = True

    @property
    def is_fit(self) -> bool:
        """Whether what the camera shows now may be judged at all."""
        return self._is_fit

    def update(self, frame: Frame) -> tuple[str, str]:
        """Take in a frame; returns the condition in one word, ``""`` when all is well, and in one sentence."""
        limits, now_s = self._limits, frame.captured_s
        if frame.image.shape != self._shape:
            self._shape, self._looks = frame.image.shape, _Looks(limits)
        seen = glance(frame.image)
        lit, white = _share_above(seen, limits.black_level), _share_above(seen, limits.white_level - 1.0)
        is_black, is_white = lit <= limits.lit_share, white >= self._looks.white_limit
        is_repeated = self._repeats.update(frame.image, seen, now_s)
        self._black.update(is_black, now_s)
        self._white.update(is_white, now_s)
        self._frozen.update(is_repeated, now_s)
        # After darkness a camera takes a moment to find its exposure; after a freeze the next picture is a good one.
        is_blind = is_black or is_white or self._black.is_told or self._white.is_told
        self._is_fit = not (is_blind or (is_repeated and self._frozen.is_told))
        if self._is_fit:
            self._looks.update(frame.image, white, now_s)
        return self._describe(lit, white)

    def _describe(self, lit: float, white: float) -> tuple[str, str]:
        """The first condition that holds, with its figures."""
        limits = self._limits
        if self._black.is_told:
            return "black", (
                f"{lit:.1%} of the picture is brighter than {limits.black_level:g} of 255: "
                "is the lens covered, is the light on?"
            )
        if self._white.is_told:
            return "overexposed", f"{white:.0%} of the picture is white: check exposure and light"
        if self._frozen.is_told:
            return "frozen", f"the very same picture for {limits.frozen_s:g} s: restart the camera, if parts move"
        return self._looks.describe()


class _Looks:
    """What is judged now and then, by comparison with what the camera showed first."""

    def __init__(self, limits: ConditionLimits) -> None:
        self.white_limit = _ALL_WHITE
        self._limits = limits
        self._taken = 0
        self._due_s = -np.inf
        self._usual_white: list[float] = []
        self._sharpness = SharpnessMonitor(limits.learning_looks, limits.deciding_looks, limits.blurred_ratio)
        self._place = PlaceMonitor(limits.learning_looks, limits.deciding_looks)
        self._blurred = _Spell(limits.changed_s, limits.changed_s)
        self._moved = _Spell(limits.changed_s, limits.changed_s)
        self._gone = _Spell(limits.gone_s, limits.changed_s)
        self._edges = self._movement = ""

    def update(self, image: NDArray[np.uint8], white: float, now_s: float) -> None:
        """Look at a picture, of which a share is white, if it is time to."""
        limits = self._limits
        if now_s < self._due_s:
            return
        self._taken += 1
        self._due_s = now_s + limits.look_every_s * (0.75 + 0.5 * (self._taken * _GOLDEN % 1.0))
        if len(self._usual_white) < limits.learning_looks:
            self._usual_white.append(white)
            if len(self._usual_white) == limits.learning_looks:
                usual = float(np.quantile(self._usual_white, _MOSTLY))
                self.white_limit = usual + limits.white_share * (1.0 - usual)
        edges, place = self._sharpness.update(image), self._place.update(image)
        moved = None if place is None else place.movement
        is_moved = moved is not None and moved.share >= limits.moved_share
        if moved is not None and is_moved:
            self._movement = f"by {moved.share:.1%} of the picture's width, turned by {moved.turn_deg:+.1f} degrees"
        self._edges = edges or self._edges
        self._blurred.update(bool(edges), now_s)
        self._moved.update(is_moved, now_s)
        self._gone.update(place is not None and place.found_share < limits.gone_share, now_s)

    def describe(self) -> tuple[str, str]:
        """The condition and its figures."""
        if self._moved.is_told:
            return (
                "moved",
                f"the background moved {self._movement}: put the camera back, or set view and threshold anew",
            )
        if self._blurred.is_told:
            return "blurred", f"{self._edges}: focus the camera, clean its lens"
        if self._gone.is_told:
            return "moved", (
                f"less than {self._limits.gone_share:.0%} of what stood still is found again: "
                "is the camera turned away or hidden, is the light too weak?"
            )
        return "", ""


class _Spell:
    """Tells of something once it has lasted, until it is gone for as long.

    Args:
        begin_s: How long it must last.
        end_s: How long it must be gone.
        longest_usual_s: Up to this, what often comes and goes must last longer than it does.
    """

    def __init__(self, begin_s: float, end_s: float, longest_usual_s: float = 0.0) -> None:
        self._begin_s = begin_s
        self._end_s = end_s
        self._longest_usual_s = longest_usual_s
        self._usual_s: deque[float] = deque(maxlen=_KEPT_SPELLS)
        self._first_s: float | None = None
        self._last_s = 0.0
        self.is_told = False

    def update(self, is_seen: bool, now_s: float) -> None:
        """Take in whether it is there now."""
        if is_seen:
            if self._first_s is None:
                self._first_s = now_s
            self._last_s = now_s
            usual_s = min(_BEYOND_USUAL * max(self._usual_s, default=0.0), self._longest_usual_s)
            self.is_told = self.is_told or now_s - self._first_s >= max(self._begin_s, usual_s)
        elif self._first_s is not None and not (self.is_told and now_s - self._last_s < self._end_s):
            self._usual_s.append(self._last_s - self._first_s)
            self._first_s, self.is_told = None, False


class _Repeats:
    """Whether a picture is the very same as the one before.

    Single pixels are compared every time, the whole picture now and then: where the single ones are all black, a
    part can move between them.

    Args:
        look_every_s: From one comparison of the whole picture to the next.
    """

    def __init__(self, look_every_s: float) -> None:
        self._look_every_s = look_every_s
        self._seen: NDArray[np.uint8] | None = None
        self._image: NDArray[np.uint8] | None = None
        self._look_due_s = 0.0

    def update(self, image: NDArray[np.uint8], seen: NDArray[np.uint8], now_s: float) -> bool:
        """Take in a picture and a glance at it."""
        is_same = self._seen is not None and np.array_equal(seen, self._seen)
        if is_same and now_s >= self._look_due_s:
            self._look_due_s = now_s + self._look_every_s
            is_same = self._image is not None and np.array_equal(image, self._image)
        if not is_same:
            self._seen, self._image, self._look_due_s = seen, image, now_s + self._look_every_s
        return is_same


def _share_above(seen: NDArray[np.uint8], level: float) -> float:
    """Share of values; of a picture lit by one colour, at most a third."""
    return float(np.count_nonzero(seen > level)) / seen.size
