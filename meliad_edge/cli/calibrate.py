"""``meliad-edge calibrate``: another false-alarm rate, without training again."""

from __future__ import annotations

from typing import Annotated

import typer

from meliad_edge.cli.options import Json, RunFolder
from meliad_edge.cli.output import describe_calibration, print_json, require_extra, say


def command(
    run: RunFolder,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Accepted rate of alarms on normal images.  [default: that of the run]")
    ] = None,
    json: Json = False,
) -> None:
    """Move a run's threshold to another false-alarm rate."""
    require_extra("torch", "train")
    from meliad_edge.calibrate import calibrate
    from meliad_edge.run import load_run, save_calibration

    fitted = load_run(run)
    calibration = calibrate(
        fitted.calibration.scores,
        target_false_alarm_rate=fitted.config.false_alarm_rate if false_alarm_rate is None else false_alarm_rate,
        score_offset=fitted.calibration.score_offset,
    )
    save_calibration(calibration, run)
    say("threshold", describe_calibration(calibration))
    say("was", f"{fitted.calibration.threshold:.3f}; bundles already exported keep it")
    if json:
        print_json(
            {
                "threshold": calibration.threshold,
                "previous_threshold": fitted.calibration.threshold,
                "target_false_alarm_rate": calibration.target_false_alarm_rate,
                "guaranteed_false_alarm_rate": calibration.guaranteed_false_alarm_rate,
                "upper_bound": calibration.upper_bound,
                "calibration_images": calibration.count,
            }
        )
