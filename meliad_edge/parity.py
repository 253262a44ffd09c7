"""Decision parity: the same frames through every engine at hand, compared with the model that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meliad_edge.bundle import Bundle, require_golden
from meliad_edge.calibrate import Calibration
from meliad_edge.errors import ParityError
from meliad_edge.runtime.engine import Engine, RawScores

# Fractions of the distance between the typical normal score and the threshold.
SCORE_LIMIT = 0.01
MAP_LIMIT = 0.02


@dataclass(frozen=True, slots=True)
class ParityResult:
    """One engine against the reference, over the same frames.

    Attributes:
        engine: Name of the engine.
        frames: Number of frames compared.
        score_error: Largest difference of a score, as a fraction of the distance from the typical normal
            score to the threshold.
        map_error: Largest difference of a map cell, in the same unit.
        rank_swaps: Pairs of frames, more than the score limit apart, whose order differs.
        label_flips: Names of the frames whose decision at the threshold differs.
    """

    engine: str
    frames: int
    score_error: float
    map_error: float
    rank_swaps: int
    label_flips: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every decision is the same and every difference is within its limit."""
        return (
            not self.label_flips
            and self.rank_swaps == 0
            and self.score_error <= SCORE_LIMIT
            and self.map_error <= MAP_LIMIT
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the verdict included."""
        return {**asdict(self), "label_flips": list(self.label_flips), "passed": self.passed}


def compare(
    engine: str, reference: RawScores, result: RawScores, calibration: Calibration, names: Sequence[str]
) -> ParityResult:
    """Compare raw results of the same frames.

    A result that is not finite counts as an unbounded error and, where the reference is finite, as a flip.

    Args:
        engine: Name for the report.
        reference: What the trained network gives.
        result: What the engine gives.
        calibration: Threshold and scale of the scores.
        names: One per frame.
    """
    unit = calibration.spread
    # Written so that NaN on either side flips: a comparison with NaN is false.
    same_label = (reference.score >= calibration.threshold) == (result.score >= calibration.threshold)
    same_label &= np.isfinite(reference.score) == np.isfinite(result.score)
    return ParityResult(
        engine=engine,
        frames=len(names),
        score_error=_largest_difference(reference.score, result.score) / unit,
        map_error=_largest_difference(reference.map, result.map) / unit,
        rank_swaps=_rank_swaps(reference.score, result.score, SCORE_LIMIT * unit),
        label_flips=tuple(name for name, same in zip(names, same_label, strict=True) if not same),
    )


def check_golden(bundle: Bundle, engine: Engine) -> ParityResult:
    """Replay the golden frames inside a bundle: parity on a machine that has no run folder."""
    golden = require_golden(bundle)
    reference = RawScores(
        np.array([frame.score for frame in golden], np.float32),
        np.stack([frame.map for frame in golden]),
        np.empty((0,), np.int64),
    )
    result = engine.infer(np.stack([frame.frame for frame in golden]))
    return compare(f"{engine.name} (golden)", reference, result, bundle.calibration, [frame.name for frame in golden])


def require_parity(results: Sequence[ParityResult]) -> None:
    """Raise unless every engine passed.

    Raises:
        ParityError: Names the first engine that failed, by how much, and the first frame that flipped.
    """
    for result in results:
        if not result.passed:
            flip = f"; first flipped frame: {result.label_flips[0]}" if result.label_flips else ""
            msg = (
                f"{result.engine} does not decide as the trained model: {len(result.label_flips)} label flips in "
                f"{result.frames} frames, score error {result.score_error:.2%} (limit {SCORE_LIMIT:.0%}){flip}"
            )
            raise ParityError(msg)


def _largest_difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def _rank_swaps(a: NDArray[np.float32], b: NDArray[np.float32], tie: float) -> int:
    with np.errstate(invalid="ignore"):
        ahead = a[:, None] - a[None, :] > tie
    return int(np.count_nonzero(ahead & (b[:, None] < b[None, :])))
