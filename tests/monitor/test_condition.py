from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from itertools import count

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from meliad_edge.monitor.condition import ConditionLimits, ConditionMonitor, _Spell
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.watcher import CameraMonitor

Image = NDArray[np.uint8]
HW = (180, 320)
FPS = 8.0  # Its times are exact.
# The same rules in fewer pictures.
QUICK = ConditionLimits(look_every_s=0.5, learning_looks=12, deciding_looks=4, changed_s=2.0, gone_s=8.0, frozen_s=5.0)
LEARNED_S = 8.0


class Camera:
    """Shows pictures to a monitor, and keeps what it said."""

    def __init__(self, limits: ConditionLimits = QUICK) -> None:
        self.monitor: CameraMonitor = ConditionMonitor(limits)
        self.rng = np.random.default_rng(0)
        self.words: list[str] = []
        self.fit: list[bool] = []
        self.detail = ""
        self.now_s = 100.0
        self._ids = count()

    def show(self, image: Image, seconds: float, *, noise: float = 2.0, fps: float = FPS) -> list[str]:
        """The words that were said meanwhile."""
        return self.play((image for _ in range(round(seconds * fps))), noise=noise, fps=fps)

    def play(self, images: Iterable[Image], *, noise: float = 2.0, fps: float = FPS) -> list[str]:
        begin = len(self.words)
        for image in images:
            seen = np.clip(image + self.rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8) if noise else image
            word, self.detail = self.monitor.update(Frame("belt", next(self._ids), self.now_s, seen, 0.0, 0.0))
            self.words.append(word)
            self.fit.append(self.monitor.is_fit)
            self.now_s += 1.0 / fps
        return self.words[begin:]


def scene(seed: int = 1) -> Image:
    """A still background with corners and edges everywhere, twice as large as a frame."""
    rng = np.random.default_rng(seed)
    image = np.full((2 * HW[0], 2 * HW[1], 3), 90, np.uint8)
    for _ in range(700):
        x, y = rng.integers(0, (2 * HW[1], 2 * HW[0])).tolist()
        width, height = rng.integers(4, 30, 2).tolist()
        level = int(rng.integers(40, 200))
        cv2.rectangle(image, (x, y), (x + width, y + height), (level,) * 3, -1)
    return image


WIDE = scene()
BELT = WIDE[100 : 100 + HW[0], 100 : 100 + HW[1]].copy()
BLACK = np.full_like(BELT, 5)


def learned(limits: ConditionLimits = QUICK) -> Camera:
    camera = Camera(limits)
    assert set(camera.show(BELT, LEARNED_S)) == {""}
    return camera


def first(words: list[str], word: str) -> int:
    return words.index(word)


def test_a_covered_lens_is_unfit_at_once_and_told_when_it_lasts() -> None:
    camera = Camera()
    camera.show(BELT, 1.0)
    words = camera.show(BLACK, 3.0, noise=3.0)
    assert not any(camera.fit[8:])
    assert words == [""] * 16 + ["black"] * 8
    assert "24 of 255" in camera.detail
    # What the camera shows while it finds its exposure is not judged.
    words = camera.show(BELT, 3.0)
    assert words == ["black"] * 15 + [""] * 9
    assert camera.fit[-24:] == [False] * 15 + [True] * 9


def test_a_camera_that_is_covered_from_the_beginning() -> None:
    camera = Camera()
    assert camera.show(BLACK, 3.0, noise=3.0)[-1] == "black"
    assert not any(camera.fit)


def test_hot_pixels_and_a_date_do_not_make_a_covered_lens_fit() -> None:
    image = np.full((720, 1280, 3), 4, np.uint8)
    cv2.putText(image, "2026-11-26 12:03:41", (20, 50), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (255, 255, 255), 2)
    image[np.random.default_rng(0).integers(0, 720, 500), np.random.default_rng(1).integers(0, 1280, 500)] = 255
    camera = Camera()
    camera.show(image, 0.5, noise=2.0)
    assert not any(camera.fit)


def test_dark_fields_and_light_of_one_colour_are_fit() -> None:
    dark_field = np.zeros((720, 1280, 3), np.uint8)
    cv2.circle(dark_field, (600, 300), 250, (140,) * 3, 8)
    red = np.zeros_like(BELT)
    red[..., 0] = BELT[..., 0]
    for image in (dark_field, red):
        camera = Camera()
        assert set(camera.show(image, 4.0)) == {""}
        assert all(camera.fit)


def test_a_flash_costs_one_frame() -> None:
    camera = learned()
    words = camera.play([BELT] * 20 + [np.full_like(BELT, 255)] + [BELT] * 20)
    assert set(words) == {""}
    assert camera.fit[-41:] == [True] * 20 + [False] + [True] * 20


def test_too_much_light() -> None:
    camera = learned()
    words = camera.show(cv2.convertScaleAbs(BELT, alpha=4.0, beta=40), 3.0)
    assert (words[0], words[-1]) == ("", "overexposed")
    assert not any(camera.fit[-24:])


def test_a_white_ground_is_usual_where_it_was_at_first() -> None:
    ground = np.full_like(BELT, 255)
    with_part = ground.copy()
    with_part[60:120, 100:160] = 80
    camera = Camera()
    assert set(camera.show(with_part, LEARNED_S, noise=0.5)) == {""}
    assert all(camera.fit)
    assert camera.show(ground, 3.0, noise=0.5)[-1] == "overexposed"
    assert not camera.monitor.is_fit


def test_dark_pauses_between_parts_become_usual_and_longer_ones_are_told() -> None:
    camera = Camera()
    for _ in range(2):
        camera.show(BELT, 5.0)
        camera.show(BLACK, 3.0)
    for _ in range(6):
        assert set(camera.show(BELT, 5.0)[24:]) == {""}
        assert "black" not in camera.show(BLACK, 6.0)
    assert camera.show(BLACK, 100.0, fps=1.0)[-1] == "black"


def test_dark_pauses_never_excuse_darkness_for_ever() -> None:
    camera = Camera(ConditionLimits(longest_pause_s=60.0))
    camera.show(BELT, 2.0)
    camera.show(BLACK, 1000.0, fps=0.1)
    camera.show(BELT, 5.0)
    words = camera.show(BLACK, 100.0, fps=1.0)
    assert first(words, "black") == 60


def test_a_frozen_picture_is_told_and_the_next_new_one_is_fit_at_once() -> None:
    camera = learned()
    words = camera.show(BELT, 7.0, noise=0.0)
    assert words == [""] * 41 + ["frozen"] * 15
    assert camera.fit[-56:] == [True] * 41 + [False] * 15
    words = camera.show(BELT, 3.0)
    assert words == ["frozen"] * 15 + [""] * 9
    assert all(camera.fit[-24:])


def test_noise_tells_a_belt_that_stands_still_from_a_frozen_picture() -> None:
    camera = learned()
    assert set(camera.show(BELT, 600.0, noise=0.5, fps=1.0)) == {""}
    assert all(camera.fit)


def test_what_moves_between_the_pixels_of_a_glance_is_not_frozen() -> None:
    camera = Camera()
    images = []
    for step in range(80):
        image = np.full((640, 640, 3), 120, np.uint8)
        image[5, 1 + 5 * step] = 200  # A glance sees every tenth row and column.
        images.append(image)
    assert set(camera.play(images, noise=0.0)) == {""}


def test_a_short_stutter_does_not_end_a_freeze() -> None:
    camera = Camera()
    camera.show(BELT, 6.0, noise=0.0)
    assert set(camera.play([BELT + 1, *[BELT] * 5], noise=0.0)) == {"frozen"}


def test_blur_is_told_ends_and_never_makes_the_camera_unfit() -> None:
    camera = learned()
    words = camera.show(cv2.GaussianBlur(BELT, (0, 0), 3), 10.0)
    # Looks that agree, two seconds, and that it lasts, two more.
    assert 3.5 <= first(words, "blurred") / FPS <= 5.0
    assert "pixels wide" in camera.detail
    assert set(camera.show(BELT, 10.0)[40:]) == {""}
    assert all(camera.fit)


def moved(share: float = 0.0, turn_deg: float = 0.0) -> Image:
    """The same scene seen by a camera that was pushed."""
    centre = (100 + HW[1] / 2, 100 + HW[0] / 2)
    transform = cv2.getRotationMatrix2D(centre, turn_deg, 1.0)
    transform[0, 2] += share * HW[1]
    return cv2.warpAffine(WIDE, transform, WIDE.shape[1::-1])[100 : 100 + HW[0], 100 : 100 + HW[1]].copy()


@pytest.mark.parametrize("image", [moved(0.03), moved(-0.06), moved(turn_deg=2.0), moved(turn_deg=-1.5)])
def test_a_movement_is_told_ends_and_never_makes_the_camera_unfit(image: Image) -> None:
    camera = learned()
    words = camera.show(image, 10.0)
    assert first(words, "moved") / FPS <= 6.0
    assert "of the picture's width" in camera.detail
    assert set(camera.show(BELT, 10.0)[48:]) == {""}
    assert all(camera.fit)


def test_parts_that_pass_or_stop_are_no_movement() -> None:
    camera = Camera()
    part = scene(2)[:100, :80]

    def belt(second: float) -> Image:
        image = BELT.copy()
        x = int(second * 60) % (HW[1] - 80)
        image[40:140, x : x + 80] = part
        return image

    assert set(camera.play(belt(second / FPS) for second in range(160))) == {""}
    assert set(camera.show(belt(20.0), 30.0)) == {""}
    assert set(camera.play(belt(20.0 + second / FPS) for second in range(160))) == {""}
    assert all(camera.fit)


def test_a_belt_in_step_with_the_looks_is_not_taken_for_a_background_that_creeps() -> None:
    texture = np.tile(scene(6)[: HW[0] - 30, :40], (1, 20, 1))

    def belt(frame: int) -> Image:
        image = BELT.copy()
        left = round(frame * (40 + 0.3) / 4) % 40  # A period in half a second, and a little more.
        image[15:-15] = texture[:, left : left + HW[1]]
        return image

    camera = Camera()
    assert set(camera.play(belt(frame) for frame in range(400))) == {""}


@pytest.mark.parametrize(
    "change",
    [
        lambda image: cv2.convertScaleAbs(image, alpha=0.8),
        lambda image: cv2.convertScaleAbs(image, alpha=1.2),
        lambda image: (255 * (image / 255) ** 1.3).astype(np.uint8),
        lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1),
    ],
    ids=["darker", "brighter", "gamma", "JPEG"],
)
def test_light_and_compression_may_change(change: Callable[[Image], Image]) -> None:
    camera = learned()
    assert set(camera.show(change(BELT), 15.0)) == {""}
    assert all(camera.fit)


def test_a_camera_that_looks_elsewhere_is_told_later() -> None:
    camera = learned()
    words = camera.show(scene(3)[: HW[0], : HW[1]], 14.0)
    assert 8.0 <= first(words, "moved") / FPS <= 12.5
    assert "found again" in camera.detail


def test_bad_pictures_at_first_are_not_learned() -> None:
    camera = Camera()
    camera.show(BLACK, 5.0)
    camera.show(BELT, 3.0)
    camera.show(cv2.GaussianBlur(BELT, (0, 0), 4), 1.0)
    camera.show(BELT, 8.0)
    assert set(camera.show(BELT, 10.0)) == {""}
    assert "blurred" in camera.show(cv2.GaussianBlur(BELT, (0, 0), 3), 10.0)
    camera.show(BELT, 10.0)
    assert "moved" in camera.show(moved(0.04), 10.0)


def test_another_size_is_learned_anew() -> None:
    camera = learned()
    larger = cv2.resize(scene(4), (480, 270))
    assert set(camera.show(larger, 20.0)) == {""}
    assert "blurred" in camera.show(cv2.GaussianBlur(larger, (0, 0), 3), 10.0)


@pytest.mark.parametrize("size_hw", [(1, 1), (8, 2000), (33, 33), (40, 600)])
def test_any_size_is_taken(size_hw: tuple[int, int]) -> None:
    camera = Camera()
    assert set(camera.show(np.full((*size_hw, 3), 100, np.uint8), 12.0)) == {""}


def test_memory_does_not_grow() -> None:
    camera = learned()
    camera.show(BELT, 20.0)
    size = len(pickle.dumps(camera.monitor))
    camera.show(BELT, 100.0)  # A whole number of decisions later.
    assert len(pickle.dumps(camera.monitor)) <= size + 1000


def test_only_capture_times_count() -> None:
    words = []
    for fps in (4.0, 40.0):
        camera = Camera()
        camera.show(BELT, LEARNED_S, fps=fps)
        words.append(camera.show(BLACK, 3.0, fps=fps))
    assert first(words[0], "black") / 4.0 == first(words[1], "black") / 40.0


def told(seen: list[tuple[float, bool]], begin_s: float, end_s: float) -> list[bool]:
    """What a spell tells, straight from its definition."""
    result: list[bool] = []
    begin = 0  # Nothing before counts.
    for now, (now_s, _) in enumerate(seen):
        if result and result[-1]:
            last_s = max(at_s for at_s, is_seen in seen[: now + 1] if is_seen)
            is_told = now_s - last_s < end_s
            begin = begin if is_told else now
        else:
            streak = [
                at_s for index, (at_s, _) in enumerate(seen[: now + 1]) if all(s for _, s in seen[index : now + 1])
            ]
            streak = [at_s for at_s in streak if at_s >= seen[begin][0]]
            is_told = bool(streak) and now_s - streak[0] >= begin_s
        result.append(is_told)
    return result


@given(
    steps=st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.booleans()), min_size=1, max_size=40),
    begin_s=st.sampled_from([0.0, 1.0, 3.0]),
    end_s=st.sampled_from([1.0, 2.5]),
)
def test_a_spell_follows_its_definition(steps: list[tuple[float, bool]], begin_s: float, end_s: float) -> None:
    times = np.cumsum([step for step, _ in steps]).tolist()
    seen = list(zip(times, [is_seen for _, is_seen in steps], strict=True))
    spell = _Spell(begin_s, end_s)
    said = []
    for now_s, is_seen in seen:
        spell.update(is_seen, now_s)
        said.append(spell.is_told)
    assert said == told(seen, begin_s, end_s)
