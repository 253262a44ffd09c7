"""How long to wait before a lost camera is tried again."""

from __future__ import annotations

import random


class Backoff:
    """Capped exponential back-off with jitter, so that many clients of one camera do not return in step.

    The n-th delay is uniform in [1/2, 1] times min(cap, first * 2^n).

    Args:
        random_source: Where the jitter comes from.
        first_s: Longest first delay.
        cap_s: Longest delay.
    """

    def __init__(self, random_source: random.Random, *, first_s: float = 0.5, cap_s: float = 30.0) -> None:
        self._random = random_source
        self._first_s = first_s
        self._cap_s = cap_s
        self._ceiling_s = first_s

    def next_delay_s(self) -> float:
        """The delay before the next attempt, in seconds."""
        delay_s = self._ceiling_s * self._random.uniform(0.5, 1.0)
        self._ceiling_s = min(self._cap_s, 2.0 * self._ceiling_s)
        return delay_s

    def reset(self) -> None:
        """Start again from the first delay: the source delivered."""
        self._ceiling_s = self._first_s
