"""The report of a run as one HTML file that needs no network: figures, curves, heat maps, tables, provenance."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge import __version__, charts
from meliad_edge.calibrate import Calibration
from meliad_edge.errors import MissingExtraError
from meliad_edge.exemplars import Exemplar
from meliad_edge.explain import encode_picture, map_to_colour
from meliad_edge.metrics import ImageMetrics, Interval, PixelMetrics

_PICTURE_SIDE = 320


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Raw scores of all test images and their ground truth.

    Attributes:
        scores: [n], finite.
        is_anomaly: [n].
    """

    scores: NDArray[np.floating]
    is_anomaly: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class InspectedImage:
    """One test image as the gallery shows it.

    Attributes:
        name: File name; shown as text, whatever it holds.
        defect: ``"good"`` or its defect class.
        is_anomaly: Ground truth.
        score: Raw score.
        image: uint8 [H, W, 3], RGB.
        overlay: uint8 [H, W, 3], RGB: the heat map over the image, drawn on ``Calibration.colour_range``.
        mask: Ground truth, [H, W], non-zero is defective; None where unknown or empty.
        resembles: Training patches behind its marked regions, strongest first.
    """

    name: str
    defect: str
    is_anomaly: bool
    score: float
    image: NDArray[np.uint8]
    overlay: NDArray[np.uint8]
    mask: NDArray[Any] | None = None
    resembles: tuple[Exemplar, ...] = ()


@dataclass(frozen=True, slots=True)
class ChangedImage:
    """An image on which two models disagree.

    Attributes:
        name: File name; shown as text, whatever it holds.
        defect: ``"good"`` or its defect class.
        outcome: What the new model does to it, in words.
        is_right: Whether the new model is right.
        image: uint8 [H, W, 3], RGB.
        before, after: What each model says of it: score in words, and the heat map over the image, uint8 [H, W, 3],
            each on its own model's scale.
    """

    name: str
    defect: str
    outcome: str
    is_right: bool
    image: NDArray[np.uint8]
    before: tuple[str, NDArray[np.uint8]]
    after: tuple[str, NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the report.

    Attributes:
        caption: What the table shows, units included.
        columns: Column heads; the first column names the row.
        rows: Cells; numbers are formatted and aligned right, text is shown as it is.
        note: A sentence below the table.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything a report may show; a section appears when its data is there.

    Attributes:
        title: First heading, for example ``"meliad on elpv"``.
        subtitle: One line under it.
        image, pixel: Headline figures.
        test: Scores of the test images, for curves, histogram and confusion counts.
        calibration: The threshold in use and the scale of all heat maps; without it nothing is called an alarm.
        comparison: The model beside the one that runs.
        changed: Images on which the two disagree, in order.
        gallery: Images to look at, in order.
        highest_normals: Normal test images with the highest scores, worst first.
        lowest_anomalies: Anomalous test images with the lowest scores, worst first.
        parity: Exported model against the trained one.
        latency: Times per stage.
        latency_charts: Their spread and course; shown with them.
        events: What ``watch`` reported.
        interpretability: How well the maps explain.
        faithfulness: Its deletion and insertion curves; shown with it.
        provenance: Names and values: command, data set and licence, settings, seeds, backbone, machine, date.
    """

    title: str
    subtitle: str = ""
    image: ImageMetrics | None = None
    pixel: PixelMetrics | None = None
    test: HeldOutScores | None = None
    calibration: Calibration | None = None
    comparison: Table | None = None
    changed: tuple[ChangedImage, ...] = ()
    gallery: tuple[InspectedImage, ...] = ()
    highest_normals: tuple[InspectedImage, ...] = ()
    lowest_anomalies: tuple[InspectedImage, ...] = ()
    parity: Table | None = None
    latency: Table | None = None
    latency_charts: tuple[charts.Chart, ...] = ()
    events: Table | None = None
    interpretability: Table | None = None
    faithfulness: charts.Chart | None = None
    provenance: tuple[tuple[str, str], ...] = ()


def write_report(path: Path, data: ReportData) -> None:
    """Write the report as one self-contained HTML file, which appears under its name only when complete.

    Raises:
        MissingExtraError: jinja2 is not installed.
        DataError: ``data.test`` has scores that are not finite.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtraError("jinja2", "train") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("meliad_edge"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "number": _number,
        "per_cent": _per_cent,
        "photo": _photo,
        "mask": _mask,
        "picture": _data_uri,
    }
    environment.filters.update(filters)
    page = environment.get_template("report.html").render(
        report=data,
        figure_rows=_figure_rows(data),
        charts=_charts(data),
        plot=charts,
        decisions=_decisions(data),
        scale=None if data.calibration is None else _colour_scale(data.calibration),
        verdict=lambda image: _verdict(image, data.calibration),
        version=__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # File names that are not valid UTF-8 reach us as lone surrogates; they are shown escaped.
    partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    value: float | None
    interval: Interval | None
    meaning: str


def _figure_rows(data: ReportData) -> list[tuple[_Figure, ...]]:
    """The headline figures, image metrics in one row and pixel metrics in the next."""
    rows: list[tuple[_Figure, ...]] = []
    if data.image is not None:
        image = data.image
        rows.append(
            (
                _Figure(
                    "Image AUROC", image.image_auroc, image.image_auroc_ci, "chance that a defect outscores a normal"
                ),
                _Figure("Image AP", image.image_ap, image.image_ap_ci, "average precision of the ranking"),
                _Figure(
                    "Image F1 max", image.image_f1_max, image.image_f1_max_ci, "best F1 that any threshold reaches"
                ),
            )
        )
    if data.pixel is not None and data.pixel.pixel_absent_because is None:
        pixel = data.pixel
        rows.append(
            (
                _Figure("Pixel AUROC", pixel.pixel_auroc, pixel.pixel_auroc_ci, "the same, pixel by pixel"),
                _Figure("Pixel AP", pixel.pixel_ap, pixel.pixel_ap_ci, "average precision of the pixels"),
                _Figure(
                    "AUPRO 0.30", pixel.aupro_30, pixel.aupro_30_ci, "share of regions covered, to 30 % false pixels"
                ),
                _Figure(
                    "AUPRO 0.05", pixel.aupro_05, pixel.aupro_05_ci, "share of regions covered, to 5 % false pixels"
                ),
            )
        )
    return rows


def _charts(data: ReportData) -> tuple[charts.Chart, ...]:
    if data.test is None or data.image is None:
        return ()
    scores, is_anomaly = data.test.scores, data.test.is_anomaly
    threshold = None if data.calibration is None else data.calibration.threshold
    return (
        charts.score_chart(scores, is_anomaly, threshold),
        charts.roc_chart(scores, is_anomaly, data.image.image_auroc, threshold),
        charts.precision_recall_chart(scores, is_anomaly, data.image.image_ap, threshold),
    )


@dataclass(frozen=True, slots=True)
class _Decisions:
    """Test images by truth and decision."""

    normals_passed: int
    false_alarms: int
    misses: int
    found: int

    @property
    def normals(self) -> int:
        return self.normals_passed + self.false_alarms

    @property
    def anomalies(self) -> int:
        return self.misses + self.found


def _decisions(data: ReportData) -> _Decisions | None:
    if data.test is None or data.calibration is None:
        return None
    alarm, anomalous = data.test.scores >= data.calibration.threshold, data.test.is_anomaly
    return _Decisions(
        normals_passed=int(np.count_nonzero(~alarm & ~anomalous)),
        false_alarms=int(np.count_nonzero(alarm & ~anomalous)),
        misses=int(np.count_nonzero(~alarm & anomalous)),
        found=int(np.count_nonzero(alarm & anomalous)),
    )


def _verdict(image: InspectedImage, calibration: Calibration | None) -> tuple[str, str] | None:
    """What became of an image, in words, and whether that was ``"right"`` or ``"wrong"``."""
    if calibration is None:
        return None
    words = {
        (True, True): ("defect found", "right"),
        (True, False): ("defect missed", "wrong"),
        (False, True): ("false alarm", "wrong"),
        (False, False): ("passed", "right"),
    }
    return words[image.is_anomaly, image.score >= calibration.threshold]


@dataclass(frozen=True, slots=True)
class _ColourScale:
    low: float
    high: float
    cell_threshold: float
    colours: NDArray[np.uint8]

    @property
    def threshold_share(self) -> float:
        """Where the threshold lies between the two ends, in [0, 1]."""
        return (self.cell_threshold - self.low) / (self.high - self.low)


def _colour_scale(calibration: Calibration) -> _ColourScale:
    low, high = calibration.colour_range
    ramp = np.linspace(low, high, 256, dtype=np.float32)[np.newaxis]
    return _ColourScale(low, high, calibration.cell_threshold, map_to_colour(ramp, (low, high)))


def _number(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, Integral) else f"{value:.4g}"


def _per_cent(share: float) -> str:
    return f"{100.0 * share:.3g} %"


def _photo(image: NDArray[np.uint8]) -> str:
    """A picture for looking at: shrunk, JPEG."""
    return _data_uri(_shrink(image, cv2.INTER_AREA), ".jpg")


def _mask(mask: NDArray[Any]) -> str:
    white = _shrink(np.where(mask != 0, 255, 0).astype(np.uint8), cv2.INTER_NEAREST)
    return _data_uri(np.repeat(white[..., np.newaxis], 3, axis=2), ".png")


def _shrink(image: NDArray[np.uint8], interpolation: int) -> NDArray[np.uint8]:
    scale = _PICTURE_SIDE / max(image.shape[:2])
    if scale >= 1.0:
        return image
    size = (max(round(scale * image.shape[1]), 1), max(round(scale * image.shape[0]), 1))
    return np.asarray(cv2.resize(image, size, interpolation=interpolation), dtype=np.uint8)


def _data_uri(image: NDArray[np.uint8], suffix: str = ".png") -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[suffix]
    return f"data:image/{kind};base64,{base64.b64encode(encode_picture(image, suffix)).decode('ascii')}"
