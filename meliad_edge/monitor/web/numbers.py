"""Numbers on their way to JSON."""

from __future__ import annotations

import math


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has none: a score may be not a number."""
    return value if value is not None and math.isfinite(value) else None
