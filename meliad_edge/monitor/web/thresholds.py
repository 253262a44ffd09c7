"""The threshold, what another one would promise, and moving it."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, HTTPException

from meliad_edge.calibrate import Calibration
from meliad_edge.device_threshold import LiveThreshold
from meliad_edge.monitor.web.models import Threshold, ThresholdChoice, Thresholds
from meliad_edge.monitor.web.problems import describe_problems

_logger = logging.getLogger(__name__)


def threshold_routes(live: LiveThreshold) -> APIRouter:
    """Everything under ``/threshold``."""
    router = APIRouter(prefix="/threshold", tags=["threshold"], responses=describe_problems(422))

    def standing() -> Thresholds:
        calibration, shipped = live.calibration, live.shipped
        return Thresholds(**_fields(calibration), bundle_threshold=shipped.threshold, is_own=calibration != shipped)

    @router.get("")
    def show_threshold() -> Thresholds:
        """The threshold in force, and that of the bundle."""
        return standing()

    @router.post("/preview")
    def preview_threshold(choice: ThresholdChoice) -> Threshold:
        """What a threshold would be and promise; nothing is changed."""
        return Threshold(**_fields(live.preview(false_alarm_rate=choice.false_alarm_rate, value=choice.value)))

    @router.put("", responses=describe_problems(507))
    def move_threshold(choice: ThresholdChoice) -> Thresholds:
        """Decide at another threshold from the next frame on, and after a restart."""
        try:
            calibration = live.move(false_alarm_rate=choice.false_alarm_rate, value=choice.value)
        except OSError as error:
            raise _not_kept(error) from error
        _logger.info("threshold moved to %g", calibration.threshold)
        return standing()

    @router.delete("", responses=describe_problems(507))
    def reset_threshold() -> Thresholds:
        """Go back to the threshold of the bundle."""
        try:
            calibration = live.reset()
        except OSError as error:
            raise _not_kept(error) from error
        _logger.info("threshold moved back to %g", calibration.threshold)
        return standing()

    return router


def _not_kept(error: OSError) -> HTTPException:
    return HTTPException(507, f"the threshold stays as it is, a new one could not be kept ({error.strerror})")


def _fields(calibration: Calibration) -> dict[str, Any]:
    return {
        "threshold": calibration.threshold,
        "target_false_alarm_rate": calibration.target_false_alarm_rate,
        "guaranteed_false_alarm_rate": calibration.guaranteed_false_alarm_rate,
        "upper_bound": calibration.upper_bound,
        "calibration_images": calibration.count,
        "score_range": (calibration.scores[0], calibration.scores[-1]),
    }
