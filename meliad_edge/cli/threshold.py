"""``meliad-edge threshold``: this device's own threshold for a bundle that stays as it was signed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge.cli.options import BundleFile, Json
from meliad_edge.cli.output import describe_calibration, print_json, say
from meliad_edge.errors import MeliadError, UsageError

if TYPE_CHECKING:
    from meliad_edge.bundle import Bundle


def command(
    model: BundleFile,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Accepted rate of alarms on normal images.", show_default=False)
    ] = None,
    value: Annotated[float | None, typer.Option(help="The threshold itself, a raw score.", show_default=False)] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="SOURCE",
            help="Calibrate on good parts that a camera, video or folder shows, or a camera of --config by its name.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Camera file, as for watch.")] = None,
    camera_secrets: Annotated[Path | None, typer.Option(metavar="FILE", help="As for watch.")] = None,
    frames: Annotated[int, typer.Option(min=30, max=4096, help="Most frames of good parts.")] = 300,
    every: Annotated[float, typer.Option(min=0.0, help="Seconds from one frame of a camera to the next.")] = 1.0,
    reset: Annotated[bool, typer.Option("--reset", help="Go back to the threshold of the bundle.")] = False,
    json: Json = False,
) -> None:
    """Move the threshold on this device; the bundle itself is not touched."""
    from meliad_edge.device_threshold import set_threshold, threshold_file
    from meliad_edge.runtime.load import open_trusted

    bundle = open_trusted(model)
    calibration = bundle.calibration
    if reset:
        if false_alarm_rate is not None or value is not None or source is not None:
            msg = "--reset goes alone"
            raise UsageError(msg)
        threshold_file(model).unlink(missing_ok=True)
    else:
        scores = None
        if source is not None:
            scores = _collect(bundle, source, config, camera_secrets, frames, every)
            if value is None and false_alarm_rate is None:
                false_alarm_rate = bundle.calibration.target_false_alarm_rate
        calibration = set_threshold(bundle, model, false_alarm_rate=false_alarm_rate, value=value, scores=scores)
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


def _collect(
    bundle: Bundle, source: str, config: Path | None, camera_secrets: Path | None, frames: int, every: float
) -> list[float]:
    """Scores of good parts."""
    from meliad_edge.camera_calibration import collect_scores
    from meliad_edge.runtime.load import make_predictor
    from meliad_edge.stream.credentials import read_secrets
    from meliad_edge.stream.uri import parse_source
    from meliad_edge.watch import open_cameras
    from meliad_edge.watch_config import CameraConfig, WatchConfig, read_watch_config

    settings = WatchConfig() if config is None else read_watch_config(config)
    chosen = next((camera for camera in settings.camera if camera.name == source), None) or CameraConfig(source=source)
    is_live = parse_source(chosen.source).is_live
    chosen = chosen.model_copy(update={"max_fps": 1.0 / every if is_live and every else None, "follow": False})
    secrets_file = camera_secrets or settings.camera_secrets
    secrets = {} if secrets_file is None else read_secrets(secrets_file)
    secrets = {name: credentials for name, credentials in secrets.items() if name == chosen.name}
    predictor = make_predictor(bundle)
    (camera,) = open_cameras(predictor, [chosen], secrets, _raise)
    scores = collect_scores(predictor, camera, frames)
    alarms = sum(score >= bundle.calibration.threshold for score in scores)
    say("good parts", f"{len(scores)} frames, {alarms} of them at or above the bundle's threshold")
    if alarms > len(scores) // 2:
        say("warning", "most of them alarm: are these good parts, and is this the camera the model was made for?")
    return scores


def _raise(name: str, error: MeliadError) -> None:
    raise error
