"""``meliad-edge threshold``: this device's own threshold for a bundle that stays as it was signed."""

from __future__ import annotations

from typing import Annotated

import typer

from meliad_edge.cli.options import BundleFile, Json
from meliad_edge.cli.output import describe_calibration, print_json, say
from meliad_edge.errors import UsageError


def command(
    model: BundleFile,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Accepted rate of alarms on normal images.", show_default=False)
    ] = None,
    value: Annotated[float | None, typer.Option(help="The threshold itself, a raw score.", show_default=False)] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Go back to the threshold of the bundle.")] = False,
    json: Json = False,
) -> None:
    """Move the threshold on this device; the bundle itself is not touched."""
    from meliad_edge.device_threshold import set_threshold, threshold_file
    from meliad_edge.runtime.load import open_trusted

    bundle = open_trusted(model)
    calibration = bundle.calibration
    if reset:
        if false_alarm_rate is not None or value is not None:
            msg = "--reset goes alone"
            raise UsageError(msg)
        threshold_file(model).unlink(missing_ok=True)
    else:
        calibration = set_threshold(bundle, model, false_alarm_rate=false_alarm_rate, value=value)
        say("saved", str(threshold_file(model)))
    say("threshold", describe_calibration(calibration))
    say("bundle's", f"{bundle.calibration.threshold:.3f}")
    if json:
        print_json(
            {
                "threshold": calibration.threshold,
                "bundle_threshold": bundle.calibration.threshold,
                "guaranteed_false_alarm_rate": calibration.guaranteed_false_alarm_rate,
                "upper_bound": calibration.upper_bound,
            }
        )
