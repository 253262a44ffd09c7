"""A threshold of this device's own, in a file beside the bundle: the signed part is never touched."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.calibrate import Calibration, calibrate, move_threshold
from meliad_edge.errors import BundleError, UsageError

if TYPE_CHECKING:
    from meliad_edge.runtime.predictor import Predictor

_MAX_FILE_BYTES = 1 << 17
MOST_SCORES = 4096

_Score = Annotated[float, Field(allow_inf_nan=False)]


class _DeviceThreshold(BaseModel):
    """The file.

    Attributes:
        manifest_sha256: Of the bundle it belongs to.
        threshold: Raw score.
        target_false_alarm_rate: The rate it was chosen for; None where the threshold itself was.
        scores: Of good parts in front of a camera of this device; None rests on those of the bundle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    threshold: float = Field(allow_inf_nan=False)
    target_false_alarm_rate: float | None = Field(gt=0.0, lt=1.0)
    scores: tuple[_Score, ...] | None = Field(default=None, min_length=1, max_length=MOST_SCORES)


def threshold_file(bundle_file: Path) -> Path:
    """Where it is: ``line3.meliad`` has ``line3.threshold.json``."""
    return bundle_file.with_suffix(".threshold.json")


def set_threshold(
    bundle: Bundle,
    bundle_file: Path,
    *,
    false_alarm_rate: float | None = None,
    value: float | None = None,
    scores: Sequence[float] | None = None,
) -> Calibration:
    """Give this device a threshold of its own for a bundle.

    Args:
        bundle: The opened bundle, as it was shipped.
        bundle_file: Where it is.
        false_alarm_rate: Accepted rate on normal images.
        value: Or the threshold itself.
        scores: Of good parts in front of a camera of this device, at most 4,096; None takes those in the bundle.

    Raises:
        UsageError: Not exactly one of the two is given, or it is out of range.
    """
    chosen, calibration = _choose(bundle, bundle.calibration, false_alarm_rate, value, scores)
    file = threshold_file(bundle_file)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(chosen.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    return calibration


def with_device_threshold(bundle: Bundle, bundle_file: Path) -> Bundle:
    """The bundle as this device decides: with its own threshold, if it has one.

    Raises:
        BundleError: The file is damaged or belongs to another bundle.
    """
    file = threshold_file(bundle_file)
    try:
        with file.open("rb") as opened:
            chosen = _DeviceThreshold.model_validate_json(opened.read(_MAX_FILE_BYTES))
    except FileNotFoundError:
        return bundle
    except (OSError, ValidationError, ValueError) as error:
        msg = f"{file}: not a threshold of meliad-edge; {_mend(bundle_file)}"
        raise BundleError(msg) from error
    if chosen.manifest_sha256 != _digest(bundle):
        msg = f"{file}: belongs to another bundle than {bundle_file.name}; {_mend(bundle_file)}"
        raise BundleError(msg)
    return replace(bundle, calibration=_calibration(bundle.calibration, chosen))


class LiveThreshold:
    """The threshold of a predictor at work, which may be moved while it decides; the move is kept for the next start.

    Safe to use from several threads.

    Args:
        predictor: Whose threshold it is.
        bundle_file: Where its bundle is.
    """

    def __init__(self, predictor: Predictor, bundle_file: Path) -> None:
        self._predictor = predictor
        self._bundle_file = bundle_file
        self._shipped = open_bundle(bundle_file).calibration
        self._moving = threading.Lock()

    @property
    def calibration(self) -> Calibration:
        """The threshold in force and what is known of its false alarms."""
        return self._predictor.bundle.calibration

    @property
    def shipped(self) -> Calibration:
        """The threshold of the bundle."""
        return self._shipped

    def preview(self, *, false_alarm_rate: float | None = None, value: float | None = None) -> Calibration:
        """What a threshold would be and promise; nothing is changed.

        Raises:
            UsageError: Not exactly one of the two is given, or it is out of range.
        """
        bundle = self._predictor.bundle
        return _choose(bundle, self._shipped, false_alarm_rate, value, self._own_scores())[1]

    def move(self, *, false_alarm_rate: float | None = None, value: float | None = None) -> Calibration:
        """Decide at another threshold from the next frame on.

        Raises:
            UsageError: Not exactly one of the two is given, or it is out of range.
            OSError: It could not be kept; nothing is changed.
        """
        with self._moving:
            bundle = replace(self._predictor.bundle, calibration=self._shipped)
            calibration = set_threshold(
                bundle,
                self._bundle_file,
                false_alarm_rate=false_alarm_rate,
                value=value,
                scores=self._own_scores(),
            )
            self._predictor.bundle = replace(bundle, calibration=calibration)
        return calibration

    def reset(self) -> Calibration:
        """Go back to the threshold of the bundle.

        Raises:
            OSError: The file could not be removed; nothing is changed.
        """
        with self._moving:
            threshold_file(self._bundle_file).unlink(missing_ok=True)
            self._predictor.bundle = replace(self._predictor.bundle, calibration=self._shipped)
        return self._shipped

    def _own_scores(self) -> tuple[float, ...] | None:
        """Those of a camera of this device, where the threshold in force rests on them."""
        scores = self.calibration.scores
        return None if scores == self._shipped.scores else scores


def _choose(
    bundle: Bundle,
    shipped: Calibration,
    false_alarm_rate: float | None,
    value: float | None,
    scores: Sequence[float] | None,
) -> tuple[_DeviceThreshold, Calibration]:
    if (false_alarm_rate is None) == (value is None):
        msg = "name either --false-alarm-rate or --value"
        raise UsageError(msg)
    base = _with_scores(shipped, scores)
    chosen = _DeviceThreshold(
        manifest_sha256=_digest(bundle),
        threshold=_finite(value) if value is not None else _at_rate(base, false_alarm_rate).threshold,
        target_false_alarm_rate=false_alarm_rate,
        scores=None if scores is None else base.scores,
    )
    return chosen, _calibration(shipped, chosen)


def _calibration(shipped: Calibration, chosen: _DeviceThreshold) -> Calibration:
    base = _with_scores(shipped, chosen.scores)
    if chosen.target_false_alarm_rate is None:
        return move_threshold(base, chosen.threshold)
    return _at_rate(base, chosen.target_false_alarm_rate)


def _with_scores(shipped: Calibration, scores: Sequence[float] | None) -> Calibration:
    return shipped if scores is None else replace(shipped, scores=tuple(sorted(scores)))


def _at_rate(shipped: Calibration, rate: float | None) -> Calibration:
    assert rate is not None
    return calibrate(shipped.scores, target_false_alarm_rate=rate, score_offset=shipped.score_offset)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        msg = f"--value {value}: a threshold is a finite score"
        raise UsageError(msg)
    return value


def _digest(bundle: Bundle) -> str:
    return hashlib.sha256(bundle.signed.manifest).hexdigest()


def _mend(bundle_file: Path) -> str:
    return f"set it again, or go back to the bundle's own with: meliad-edge threshold {bundle_file} --reset"
