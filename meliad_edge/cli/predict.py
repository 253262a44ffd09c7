"""``meliad-edge predict``: decide on images; show where and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge.cli.options import BundleEngine, BundleFile, BundlePrecision, Json
from meliad_edge.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from meliad_edge.runtime.predictor import Prediction


def command(
    model: BundleFile,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Files, folders or globs.", show_default=False)
    ],
    json: Json = False,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write an overlay and the raw map per image.")
    ] = None,
    engine: BundleEngine = "auto",
    precision: BundlePrecision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.  [default: every core]")] = None,
    triton: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Score on a Triton server that has this model: grpc://HOST:PORT or grpcs://HOST:PORT, and /NAME where "
            "the model has another name there than the bundle.",
        ),
    ] = None,
) -> None:
    """Decide on images with a bundle; a bad file is reported and the rest goes on."""
    from meliad_edge.data.images import find_images, read_image
    from meliad_edge.device_threshold import threshold_file
    from meliad_edge.errors import DataError, ImageError, PartialFailureError, UsageError
    from meliad_edge.explain import save_explanation
    from meliad_edge.progress import track
    from meliad_edge.runtime.load import load_predictor, load_triton_predictor

    if triton is None:
        predictor = load_predictor(model, precision=precision, engine=engine, threads=threads)
    elif engine != "auto" or threads is not None:
        msg = "--engine and --threads are for this machine; with --triton the server decides both"
        raise UsageError(msg)
    else:
        predictor = load_triton_predictor(model, triton, precision=precision)
    if (own := threshold_file(model)).exists():
        say("threshold", f"{predictor.bundle.calibration.threshold:.3f}, set on this device in {own}")
    errors: list[dict[str, str]] = []
    paths: list[Path] = []
    for pattern in images:
        try:
            paths += find_images(pattern)
        except DataError as error:
            errors.append({"image": pattern, "error": str(error)})
            say("failed", str(error))
    predictions: list[tuple[Path, Prediction]] = []
    for path in track(paths, "predicting"):
        try:
            image = read_image(path)
        except ImageError as error:
            errors.append({"image": str(path), "error": str(error)})
            say("failed", str(error))
            continue
        prediction = predictor.predict(image)
        predictions.append((path, prediction))
        if save is not None:
            save_explanation(
                save, f"{len(predictions):04d}_{path.stem}", image, prediction, predictor.bundle.calibration
            )
    if json:
        print_json(
            {
                "model": str(model),
                "model_sha256": predictor.model_sha256,
                "precision": predictor.precision,
                "engine": predictor.engine.name,
                "predictions": [{"image": str(path), **prediction.to_dict()} for path, prediction in predictions],
                "errors": errors,
            }
        )
    elif predictions:
        print_table(
            ("image", "score", "threshold", "decision", "where", "like"),
            [_row(path, prediction) for path, prediction in predictions],
        )
    if save is not None and predictions:
        say("saved", f"{save}: one overlay (.png) and one raw map (.npy) per image")
    if errors and not predictions:
        msg = f"none of {len(errors)} inputs can be used; the first: {errors[0]['error']}"
        raise DataError(msg)
    if errors:
        msg = f"{len(errors)} of {len(errors) + len(predictions)} inputs failed; the others were decided"
        raise PartialFailureError(msg)


def _row(path: Path, prediction: Prediction) -> tuple[str, ...]:
    where = like = ""
    if prediction.regions:
        region = prediction.regions[0]
        where = f"{region.x},{region.y} {region.width}x{region.height}"
        like = f"{region.resembles.defect} ({region.resembles.source})" if region.resembles is not None else ""
    decision = "ANOMALY" if prediction.is_anomaly else "normal"
    return path.name, f"{prediction.score:.3f}", f"{prediction.threshold:.3f}", decision, where, like
