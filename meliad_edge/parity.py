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
from meliad_edge.precision import ParityLimits, Precision
from meliad_edge.runtime.engine import Engine, RawScores


@dataclass(frozen=True, slots=True)
class Flip:
    """A frame whose decision differs from that of the trained network.

    Attributes:
        name: File name.
        reference: Score of the trained network.
        score: Score of the engine, on the other side of the threshold or not finite.
    """

    name: str
    reference: float
    score: float


@dataclass(frozen=True, slots=True)
class ParityResult:
    """One engine with one graph against the reference, over the same frames.

    Attributes:
        engine: Name of the engine.
        precision: Precision of the graph.
        frames: Number of frames compared.
        score_error: Largest difference of a score, as a fraction of the distance from the typical normal
            score to the threshold.
        map_error: Largest difference of a map cell, in the same unit.
        rank_swaps: Pairs of frames, more than the score limit apart, whose order differs.
        label_flips: The frames whose decision at the threshold differs.
        threshold: Where they are decided.
        limits: Largest errors that pass.
    """

    engine: str
    precision: Precision
    frames: int
    score_error: float
    map_error: float
    rank_swaps: int
    label_flips: tuple[Flip, ...]
    threshold: float
    limits: ParityLimits

    @property
    def passed(self) -> bool:
        """Whether every decision is the same and every difference is within its limit."""
        return (
            not self.label_flips
            and self.rank_swaps == 0
            and self.score_error <= self.limits.score
            and self.map_error <= self.limits.map
        )

    def describe_failure(self) -> str:
        """What differs, by how much, and the first frame whose decision changed."""
        text = (
            f"{len(self.label_flips)} label flips in {self.frames} frames, score error {self.score_error:.2%} (limit "
            f"{self.limits.score:.0%}), map error {self.map_error:.2%} (limit {self.limits.map:.0%}), "
            f"{self.rank_swaps} rank swaps"
        )
        if self.label_flips:
            flip = self.label_flips[0]
            text += (
                f"; {flip.name} scores {flip.score:.4f} instead of {flip.reference:.4f}, threshold {self.threshold:.4f}"
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the verdict included."""
        return {**asdict(self), "limits": self.limits.model_dump(), "passed": self.passed}


def compare(
    engine: str,
    precision: Precision,
    reference: RawScores,
    result: RawScores,
    calibration: Calibration,
    limits: ParityLimits,
    names: Sequence[str],
) -> ParityResult:
    """Compare raw results of the same frames.

    A result that is not finite counts as an unbounded error and, where the reference is finite, as a flip.

    Args:
        engine: Name for the report.
        precision: Of the graph it executes.
        reference: What the trained network gives.
        result: What the engine gives.
        calibration: Threshold and scale of the scores.
        limits: Largest errors that pass.
        names: One per frame.
    """
    unit = calibration.spread
    # Written so that NaN on either side flips: a comparison with NaN is false.
    same_label = (reference.score >= calibration.threshold) == (result.score >= calibration.threshold)
    same_label &= np.isfinite(reference.score) == np.isfinite(result.score)
    return ParityResult(
        engine=engine,
        precision=precision,
        frames=len(names),
        score_error=_largest_difference(reference.score, result.score) / unit,
        map_error=_largest_difference(reference.map, result.map) / unit,
        rank_swaps=_rank_swaps(reference.score, result.score, limits.score * unit),
        label_flips=tuple(
            Flip(names[i], float(reference.score[i]), float(result.score[i]))
            for i in map(int, np.flatnonzero(~same_label))
        ),
        threshold=calibration.threshold,
        limits=limits,
    )


def check_golden(bundle: Bundle, engine: Engine, precision: Precision) -> ParityResult:
    """Replay the golden frames inside a bundle: parity on a machine that has no run folder."""
    golden = require_golden(bundle)
    reference = RawScores(
        np.array([frame.score for frame in golden], np.float32),
        np.stack([frame.map for frame in golden]),
        np.empty((0,), np.int64),
    )
    result = engine.infer(np.stack([frame.frame for frame in golden]))
    return compare(
        f"{engine.name} (golden)",
        precision,
        reference,
        result,
        bundle.calibration,
        bundle.manifest.precisions[precision],
        [frame.name for frame in golden],
    )


def require_parity(results: Sequence[ParityResult]) -> None:
    """Raise unless every engine passed.

    Raises:
        ParityError: Names the first engine that failed, by how much, and the first frame that flipped.
    """
    for result in results:
        if not result.passed:
            msg = (
                f"{result.engine} in {result.precision} does not decide as the trained model: "
                f"{result.describe_failure()}"
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
