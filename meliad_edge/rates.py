"""How sure a counted rate is, and whether a change of decisions may be chance: exact, for any number of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Rate:
    """So many of so many.

    Attributes:
        count: Images of which it is true.
        total: Images in all.
    """

    count: int
    total: int

    @property
    def share(self) -> float | None:
        """In [0, 1]; None of no images."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """Two-sided 95 % Clopper-Pearson interval; [0, 1] of no images."""
        one_sided = 0.5 * (1.0 + _CONFIDENCE)
        return (
            1.0 - upper_bound(self.total - self.count, self.total, confidence=one_sided),
            upper_bound(self.count, self.total, confidence=one_sided),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"count": self.count, "total": self.total, "share": self.share, "interval": list(self.interval)}


def upper_bound(count: int, total: int, *, confidence: float) -> float:
    """One-sided upper Clopper-Pearson bound of a binomial rate: the p with P(X <= count | p) = 1 - confidence.

    Args:
        count: Images of which something is true.
        total: Images in all.
        confidence: In (0, 1).
    """
    if count >= total:
        return 1.0
    low, high = count / total, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _binomial_cdf(count, total, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def chance_of_loss(mended: int, broken: int) -> float:
    """One-sided exact sign test (McNemar): how likely so many or more changes are for the worse if all are coin tosses.

    Args:
        mended: Images that one model decides wrongly and the other rightly.
        broken: Images the other way round.
    """
    changed = mended + broken
    return float(sum(math.comb(changed, k) for k in range(broken, changed + 1)) / 2**changed)


def _binomial_cdf(k: int, n: int, p: float) -> float:
    log_terms = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
        if 0.0 < p < 1.0
    ]
    return sum(math.exp(term) for term in log_terms)
