"""``meliad-edge score``: decide on an archive of any size, here or on a Ray cluster."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge.cli.options import BundleEngine, BundleFile, BundlePrecision, Json
from meliad_edge.cli.output import print_json, require_extra, say
from meliad_edge.errors import PartialFailureError, UsageError

if TYPE_CHECKING:
    from collections.abc import Generator

    from meliad_edge.archive.scorer import ScoringTask, UnitDone


def command(
    model: BundleFile,
    archive: Annotated[
        str,
        typer.Argument(
            metavar="ARCHIVE",
            help="Folder, glob, .tar shards or .parquet files of images; a path or any URL that fsspec knows.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Folder or URL of the result; one that was begun goes on.", show_default=False
        ),
    ],
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Score on a Ray cluster: auto, HOST:PORT, or local to start one here."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Engines at a time.  [default: one per core, of the cluster with --ray]")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each engine.")] = 1,
    worst: Annotated[int, typer.Option(min=0, help="Pictures of so many of the highest scores.")] = 100,
    engine: BundleEngine = "auto",
    precision: BundlePrecision = None,
    json: Json = False,
) -> None:
    """Decide on every image of an archive, once each, into Parquet files; go on where a run was stopped."""
    require_extra("pyarrow", "archive")
    from meliad_edge.archive.folder import ResultFolder
    from meliad_edge.archive.items import Archive
    from meliad_edge.archive.scorer import ScoringTask
    from meliad_edge.archive.worst import finish
    from meliad_edge.runtime.load import load_predictor

    predictor = load_predictor(model, precision=precision, engine=engine)
    images = Archive.open(_absolute(archive))
    folder = ResultFolder.open(_absolute(out))
    if images.holds(folder.files, folder.path):
        msg = f"--out {out} lies in the archive, which would be scored with it the next time; name a folder outside"
        raise UsageError(msg)
    say("listing", images.url)
    folder.begin(
        images,
        {
            "archive": images.url,
            "model_sha256": predictor.model_sha256,
            "threshold": predictor.bundle.calibration.threshold,
        },
    )
    sizes, finished = folder.sizes(), folder.finished()
    waiting = [unit for unit in range(len(sizes)) if unit not in finished]
    say("archive", f"{sum(sizes):,} images in {len(sizes):,} units, {len(sizes) - len(waiting):,} of them done")
    task = ScoringTask(images.url, folder.url, predictor.bundle, precision, engine, threads)
    if waiting:
        _score(task, waiting, sizes, workers, ray)
    summary = finish(folder, images, predictor, worst)
    say("images", f"{summary.images:,}, {summary.anomalies:,} of them anomalies")
    say("saved", f"{folder.url}: results/ (Parquet), worst.html, errors.csv, summary.json")
    if json:
        print_json({"out": folder.url, **asdict(summary)})
    if summary.missing:
        msg = (
            f"{summary.missing:,} of {sum(sizes):,} images have no row in {folder.url}; score again into another folder"
        )
        raise PartialFailureError(msg)
    if summary.errors:
        msg = (
            f"{summary.errors:,} of {summary.images:,} images could not be decided; errors.csv in {folder.url} says why"
        )
        raise PartialFailureError(msg)


def _score(task: ScoringTask, units: list[int], sizes: list[int], workers: int | None, ray: str | None) -> None:
    from meliad_edge.archive.workers import default_workers, score_here, score_on_ray
    from meliad_edge.progress import progress_bar

    done: Generator[UnitDone, None, None]
    if ray is None:
        done = score_here(task, units, workers or max(1, default_workers() // task.threads))
    else:
        done = score_on_ray(task, units, workers, ray)
    with closing(done), progress_bar() as bar:
        total = sum(sizes)
        progress = bar.add_task(
            f"{'scoring':<24}", total=total, completed=total - sum(sizes[unit] for unit in units), note=""
        )
        batches: set[int] = set()
        for one in done:
            batches.add(one.batch_size)
            note = f"{one.images / one.seconds:.0f}/s each"
            bar.update(progress, advance=one.images, note=note)
    say("batches", f"of up to {max(batches)}, as each worker measured")


def _absolute(url: str) -> str:
    """Workers may start in another folder."""
    return url if "://" in url or "::" in url else str(Path(url).absolute())
