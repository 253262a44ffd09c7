"""The end of a result: its counts, its bad files, and pictures of its highest scores."""

from __future__ import annotations

import csv
import heapq
import html
import io
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import cv2

from meliad_edge.archive.folder import ResultFolder
from meliad_edge.archive.items import Archive
from meliad_edge.archive.read import read_unit
from meliad_edge.errors import ImageError
from meliad_edge.explain import overlay
from meliad_edge.progress import track
from meliad_edge.runtime.predictor import Predictor

_THUMBNAIL_HEIGHT = 240
_JPEG_QUALITY = 85

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem }}
ol {{ display: flex; flex-wrap: wrap; gap: 1rem; padding: 0; list-style: none }}
figure {{ margin: 0 }}
figcaption {{ max-width: 20rem; overflow-wrap: anywhere }}
</style>
<h1>Highest scores first</h1>
<p>{archive}<br>{facts}</p>
<ol>
{figures}
</ol>
</html>
"""
_FIGURE = (
    '<li><figure><img src="worst/{name}" alt="evidence over {id}" height="{height}" loading="lazy">'
    "<figcaption>{score:.3f} {decision}<br>{id}</figcaption></figure></li>"
)


@dataclass(frozen=True, slots=True)
class Summary:
    """A result in figures.

    Attributes:
        images: In the archive.
        anomalies: At or above the threshold.
        errors: That could not be decided.
        missing: That have no row.
    """

    images: int
    anomalies: int
    errors: int
    missing: int


@dataclass(frozen=True, slots=True, order=True)
class _Scored:
    score: float
    unit: int
    id: str
    is_anomaly: bool


def finish(folder: ResultFolder, archive: Archive, predictor: Predictor, worst: int) -> Summary:
    """Write ``summary.json``, ``errors.csv``, ``worst.html`` and its pictures, from the results alone.

    Args:
        folder: The result.
        archive: Where the pictures are.
        predictor: Draws what was seen in them.
        worst: Number of pictures.
    """
    sizes = folder.sizes()
    images = anomalies = errors = 0
    highest: list[_Scored] = []
    table = io.StringIO()
    bad = csv.writer(table)
    bad.writerow(("id", "error"))
    for unit, result in folder.results(["id", "score", "is_anomaly", "error"]):
        images += result.num_rows
        for one in result.to_pylist():
            if one["error"] is not None:
                errors += 1
                bad.writerow((one["id"], one["error"]))
                continue
            anomalies += one["is_anomaly"]
            score = math.inf if math.isnan(one["score"]) else one["score"]
            scored = _Scored(score, unit, one["id"], one["is_anomaly"])
            (heapq.heappush if len(highest) < worst else heapq.heappushpop)(highest, scored)
    summary = Summary(images, anomalies, errors, sum(sizes) - images)
    folder.write("errors.csv", table.getvalue().encode())
    figures = _draw(folder, archive, predictor, sorted(highest, reverse=True))
    manifest, threshold = predictor.bundle.manifest, predictor.bundle.calibration.threshold
    facts = (
        f"{images:,} images, {anomalies:,} anomalies, {errors:,} that could not be decided; "
        f"{manifest.name} version {manifest.version}, threshold {threshold:.3f}"
    )
    title = f"{archive.url}: highest scores first"
    page = _PAGE.format(
        title=html.escape(title), archive=html.escape(archive.url), facts=html.escape(facts), figures="\n".join(figures)
    )
    folder.write("worst.html", page.encode(errors="backslashreplace"))
    record: dict[str, Any] = {
        "images": images,
        "anomalies": anomalies,
        "errors": errors,
        "missing": summary.missing,
        "model_sha256": predictor.model_sha256,
        "threshold": threshold,
    }
    folder.write("summary.json", json.dumps(record, indent=1).encode() + b"\n")
    return summary


def _draw(folder: ResultFolder, archive: Archive, predictor: Predictor, highest: list[_Scored]) -> list[str]:
    """Write the pictures; returns their places on the page."""
    folder.files.makedirs(folder.at("worst"), exist_ok=True)
    units: dict[int, dict[str, int]] = defaultdict(dict)
    for rank, scored in enumerate(highest):
        units[scored.unit][scored.id] = rank
    figures: dict[int, str] = {}
    for unit, ranks in track(list(units.items()), "drawing"):
        items = [item for item in folder.read_unit(unit) if item.id in ranks]
        for item, image in read_unit(archive.files, items):
            if isinstance(image, ImageError):
                continue  # gone since it was scored
            prediction = predictor.predict(image)
            drawn = overlay(image, prediction.map, predictor.bundle.calibration.colour_range, prediction.regions)
            width = max(1, round(drawn.shape[1] * _THUMBNAIL_HEIGHT / drawn.shape[0]))
            small = cv2.resize(drawn, (width, _THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)
            bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
            _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            rank = ranks[item.id]
            name = f"{rank + 1:04d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', item.id)[-80:]}.jpg"
            folder.write(f"worst/{name}", jpeg.tobytes())
            figures[rank] = _FIGURE.format(
                name=name,
                id=html.escape(item.id),
                height=_THUMBNAIL_HEIGHT,
                score=highest[rank].score,
                decision="ANOMALY" if highest[rank].is_anomaly else "normal",
            )
    return [figures[rank] for rank in sorted(figures)]
