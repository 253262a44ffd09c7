"""``meliad-edge fit``: images and a few labelled defects to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meliad_edge.cli.output import describe_calibration, print_json, require_extra, say
from meliad_edge.config import load_fit_config
from meliad_edge.errors import UsageError


def command(
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="MVTec-style folder, two-folder set, CSV file, or 'elpv'.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write.  [default: runs/fit]")] = None,
    config: Annotated[Path | None, typer.Option(help="Project file (TOML) with these options as keys.")] = None,
    detector: Annotated[str | None, typer.Option(help="Detector.  [default: meliad]")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the detector; may be repeated.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Labelled defects to learn from.  [default: 10]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split and training.  [default: 0]")] = None,
    shot_class: Annotated[
        str | None, typer.Option(help="Draw all shots from this class; it leaves the test set.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="timm name.  [default: tf_efficientnet_lite0]")] = None,
    weights: Annotated[Path | None, typer.Option(help="Local weights file of the backbone.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Model input in pixels, square.  [default: chosen from the images]")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Largest model input to choose, in areas of 256 x 256.  [default: 2.0]")
    ] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Accepted rate on normal images.  [default: 0.01]")
    ] = None,
    feature_cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep backbone features here, for the next fit.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Train a detector from normal images and a few labelled defects."""
    settings = load_fit_config(
        config,
        {
            "data": data,
            "out": out,
            "detector": detector,
            "options": _options(option),
            "shots": shots,
            "seed": seed,
            "shot_class": shot_class,
            "backbone": backbone,
            "weights": weights,
            "image_size": image_size,
            "budget": budget,
            "false_alarm_rate": false_alarm_rate,
            "feature_cache": feature_cache,
        },
    )
    require_extra("torch", "train")
    from meliad_edge.train import fit

    run = fit(settings, settings.out, say)
    say("threshold", describe_calibration(run.calibration))
    say("saved", f"{settings.out}      next: meliad-edge evaluate {settings.out} --report {settings.out}/report.html")
    if json:
        print_json(
            {
                "run": str(settings.out),
                "threshold": run.calibration.threshold,
                "calibration_images": run.calibration.count,
                "target_false_alarm_rate": run.calibration.target_false_alarm_rate,
                "guaranteed_false_alarm_rate": run.calibration.guaranteed_false_alarm_rate,
                "upper_bound": run.calibration.upper_bound,
                "facts": run.facts,
            }
        )


def _options(texts: list[str] | None) -> dict[str, str] | None:
    if not texts:
        return None
    pairs = [text.partition("=") for text in texts]
    for (name, equals, _), text in zip(pairs, texts, strict=True):
        if not name or not equals:
            msg = f"--option {text!r} is not NAME=VALUE; write for example --option steps=500"
            raise UsageError(msg)
    return {name: value for name, _, value in pairs}
