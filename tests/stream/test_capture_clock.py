"""Arrivals are made from known capture times, so the error of every estimate is known."""

from __future__ import annotations

import random

import pytest

from meliad_edge.stream.capture_clock import CaptureClock

INTERVAL_S = 0.04


class Line:
    """A camera, a network and a decoder that takes 2 ms per picture.

    A picture is captured every 40 ms and is under way for ``delay_s(captured_s)``; the decoder takes pictures one
    after the other, as early as it can.
    """

    def __init__(self, delay_s: float = 0.1, *, opened_s: float = 0.0, rate: float = 1.0) -> None:
        self.clock = CaptureClock()
        self.delay_s = delay_s
        self.rate = rate
        self.stalls: list[tuple[float, float]] = []
        self.free_s = opened_s  # When the decoder has time.
        self.errors_s: list[float | None] = []
        self.index = 0

    def play(self, pictures: int, jitter: random.Random | None = None) -> list[float | None]:
        """Error of each estimate, estimated minus real age; None for a picture that is held back."""
        errors: list[float | None] = []
        for _ in range(pictures):
            made_s = INTERVAL_S * self.index
            arrived_s = made_s + self.delay_s + (0.0 if jitter is None else jitter.random() * 0.02)
            for begin_s, end_s in self.stalls:
                if begin_s <= arrived_s < end_s:
                    arrived_s = end_s
            decoded_s = max(self.free_s, arrived_s) + 0.002
            captured_s = self.clock.captured_s(decoded_s, decoded_s - self.free_s, 7.0 + made_s * self.rate)
            self.free_s = decoded_s
            self.index += 1
            errors.append(None if captured_s is None else (made_s + self.delay_s) - captured_s)
        return errors


def known(errors: list[float | None]) -> list[float]:
    return [error for error in errors if error is not None]


def test_a_steady_stream_is_placed_where_it_arrives() -> None:
    errors = Line().play(500)
    assert errors.count(None) <= 2
    assert max(map(abs, known(errors))) < 0.005


def test_what_piled_up_while_the_stream_was_opened_is_not_new() -> None:
    errors = Line(opened_s=1.2).play(100)
    held_back = errors.index(next(error for error in errors if error is not None))
    assert held_back == pytest.approx(1.1 / INTERVAL_S, abs=4)
    assert max(map(abs, known(errors))) < 0.005


def test_a_stall_of_the_network_does_not_make_old_pictures_new() -> None:
    line = Line()
    line.play(250)
    now_s = INTERVAL_S * line.index
    line.stalls.append((now_s, now_s + 3.0))
    errors = line.play(200)
    assert None not in errors
    assert max(map(abs, known(errors))) < 0.005


def test_jitter_of_the_network_is_taken_for_lateness_and_no_more() -> None:
    errors = known(Line().play(2000, random.Random(1)))
    # A picture that took longer was captured as early as the others: exact up to the drift that is allowed.
    assert max(map(abs, errors[50:])) < 0.004


@pytest.mark.parametrize("rate", [1.0001, 0.9999])
def test_a_clock_that_drifts_is_followed(rate: float) -> None:
    errors = known(Line(rate=rate).play(25 * 3600))
    assert max(map(abs, errors)) < 0.02


@pytest.mark.parametrize("rate", [0.8, 1.25])
def test_timestamps_of_a_wrong_rate_never_make_live_pictures_much_too_old(rate: float) -> None:
    errors = known(Line(rate=rate).play(25 * 120))
    # Nor new: an estimate is never later than the arrival.
    assert max(map(abs, errors)) < 1.0


def test_a_time_line_that_jumps_begins_anew() -> None:
    line = Line()
    line.play(100)
    clock = line.clock
    assert clock.captured_s(10.0, 0.04, 100_000.0) is None
    assert clock.captured_s(10.04, 0.038, 100_000.04) == 10.04
    assert clock.captured_s(10.08, 0.038, 5.0) is None


def test_a_path_that_becomes_longer_for_good_is_accepted_after_some_seconds() -> None:
    line = Line()
    line.play(200)
    line.delay_s = 0.9
    errors = line.play(300)
    assert errors[0] == pytest.approx(0.8, abs=0.01)  # By the time line so far, it is late.
    assert known(errors)[-1] == pytest.approx(0.0, abs=0.01)


def test_pictures_that_a_decoder_held_back_until_it_had_waited_in_vain_are_old() -> None:
    line = Line()
    line.play(100)
    now_s, stream_s = line.free_s, 7.0 + INTERVAL_S * line.index
    for number in range(2):  # FFmpeg gives one after each time-out of 5 s.
        now_s += 5.0
        captured_s = line.clock.captured_s(now_s, 5.0, stream_s + INTERVAL_S * number)
        assert captured_s is not None and now_s - captured_s > 4.9


def test_a_decoder_that_never_has_to_wait_is_trusted_in_the_end() -> None:
    clock = CaptureClock()
    times_s = [INTERVAL_S * i for i in range(400)]
    placed = [clock.captured_s(time_s, 0.0, time_s) for time_s in times_s]
    assert placed[0] is None
    assert placed[-1] == pytest.approx(times_s[-1], abs=0.01)
