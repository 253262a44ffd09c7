from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.benchmarks.interleaved import Rounds, time_rounds

FRAMES = [np.full((2, 2, 3), value, np.uint8) for value in range(4)]


class Bench:
    """A clock that runners move, and what was given to whom."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[tuple[str, int]] = []
        self.rests = 0

    def runner(self, name: str, seconds: float, *, fails_at: int | None = None):  # type: ignore[no-untyped-def]
        def run(frame: NDArray[np.uint8]) -> None:
            self.calls.append((name, int(frame[0, 0, 0])))
            if sum(called == name for called, _ in self.calls) == fails_at:
                msg = "out of memory"
                raise RuntimeError(msg)
            self.now_s += seconds

        return run

    def rest(self, seconds: float) -> None:
        self.rests += 1
        self.now_s += seconds


def time_on(bench: Bench, runners: dict[str, object], rounds: int, seed: int = 0) -> Rounds:
    rng = np.random.default_rng(seed)
    return time_rounds(runners, FRAMES, rounds, rng, clock=lambda: bench.now_s, rest=bench.rest)  # type: ignore[arg-type]


def test_all_take_turns_in_every_round_and_rests_do_not_count() -> None:
    bench = Bench()
    timed = time_on(bench, {"ours": bench.runner("ours", 2**-7), "theirs": bench.runner("theirs", 2**-4)}, 5)
    assert {name: len(medians) for name, medians in timed.medians_s.items()} == {"ours": 5, "theirs": 5}
    assert timed.median_ms("ours") == pytest.approx(7.8125)
    assert timed.median_ms("theirs") == pytest.approx(62.5)
    assert bench.rests == 12  # two runners, five rounds and the one that warms up
    # Frames come in turn, and the first of a turn is not counted: 20 of ours fit, 4 of theirs.
    counts = [sum(name == wanted for name, _ in bench.calls) for wanted in ("ours", "theirs")]
    assert counts == [6 * 21, 6 * 5]
    assert [value for name, value in bench.calls if name == "theirs"][:7] == [0, 0, 1, 2, 3, 0, 0]


def test_a_slow_runner_still_gets_one_frame_that_counts() -> None:
    bench = Bench()
    timed = time_on(bench, {"slow": bench.runner("slow", 3.0)}, 2)
    assert timed.medians_s == {"slow": pytest.approx([3.0, 3.0])}
    assert len(bench.calls) == 3 * 2


def test_the_order_is_drawn_anew_in_every_round() -> None:
    bench = Bench()
    names = [f"runner {index}" for index in range(6)]
    time_on(bench, {name: bench.runner(name, 0.25) for name in names}, 2)
    turns = [name for name, _ in bench.calls[::2]]  # one frame to begin with and one that counts
    rounds = [turns[start : start + 6] for start in (0, 6, 12)]
    assert [sorted(order) for order in rounds] == [names] * 3
    assert len({tuple(order) for order in rounds}) > 1


def test_a_runner_that_fails_is_dropped_with_its_reason_and_the_rest_goes_on() -> None:
    bench = Bench()
    runners = {"ours": bench.runner("ours", 0.2), "theirs": bench.runner("theirs", 0.2, fails_at=5)}
    timed = time_on(bench, runners, 4)
    assert timed.failures == {"theirs": "RuntimeError: out of memory"}
    assert list(timed.medians_s) == ["ours"]
    assert len(timed.medians_s["ours"]) == 4
    assert sum(name == "theirs" for name, _ in bench.calls) == 5


def test_ratios_are_taken_within_rounds() -> None:
    # The machine is three times as slow in the last two rounds: medians of all times differ, ratios do not.
    timed = Rounds({"ours": [1.0, 1.0, 3.0, 3.0], "theirs": [7.0, 7.0, 21.0, 21.0]}, {})
    ratio = timed.ratio("theirs", "ours")
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((7.0, 7.0, 7.0))
    noisy = Rounds({"ours": [1.0] * 5, "theirs": [6.0, 7.0, 8.0, 9.0, 10.0]}, {}).ratio("theirs", "ours")
    assert noisy.median == 8.0
    assert 6.0 <= noisy.low < 8.0 < noisy.high <= 10.0
