"""A bundle in use: frame in, decision with its map, regions and the reason for each region out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.bundle import Bundle
from meliad_edge.calibrate import Calibration
from meliad_edge.data.preprocess import to_model_input
from meliad_edge.errors import UsageError
from meliad_edge.exemplars import Exemplar
from meliad_edge.precision import Precision
from meliad_edge.runtime.engine import Engine, RawScores
from meliad_edge.runtime.view import WHOLE, Box, View


@dataclass(frozen=True, slots=True)
class Region:
    """A connected part of the image whose cells reach the cell threshold.

    Attributes:
        x, y, width, height: Bounding box in pixels of the original image.
        peak: Largest evidence of its cells, on the scale of the map.
        resembles: The labelled defect patch its peak cell is nearest to, if the model knows defects.
        differs_from: The normal training patch its peak cell was compared with.
    """

    x: int
    y: int
    width: int
    height: int
    peak: float
    resembles: Exemplar | None = None
    differs_from: Exemplar | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "x": self.x,
            "y": self.y,
            "width": self.width,
            "height": self.height,
            "peak": self.peak,
            "resembles": _name_exemplar(self.resembles),
            "differs_from": _name_exemplar(self.differs_from),
        }


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Where the time of one prediction went, in seconds."""

    preprocess_s: float
    infer_s: float
    post_s: float

    @property
    def total_s(self) -> float:
        """From the decoded frame in memory to the decision."""
        return self.preprocess_s + self.infer_s + self.post_s


@dataclass(frozen=True, slots=True)
class Prediction:
    """The decision on one image.

    Attributes:
        score: Raw score.
        threshold: Raw score at or above which ``is_anomaly`` is true.
        map: float32 [H, W], evidence per cell of the model's grid, on the model's absolute scale; -inf where a mask
            covers the cell.
        regions: Marked regions, highest peak first; empty on a normal image.
        times: Stage times of this prediction; of images that were scored together, those of all.
        area: The part of the image that the map covers; None is all of it.
    """

    score: float
    threshold: float
    map: NDArray[np.float32]
    regions: tuple[Region, ...]
    times: StageTimes
    area: Box | None = None

    @property
    def is_anomaly(self) -> bool:
        """Whether the score reaches the threshold; a score that is not a number never passes as normal."""
        return not self.score < self.threshold

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the map as rows of cells."""
        return {
            "score": self.score,
            "threshold": self.threshold,
            "is_anomaly": self.is_anomaly,
            "decision": "anomaly" if self.is_anomaly else "normal",
            "regions": [region.to_dict() for region in self.regions],
            "map": [[round(float(cell), 5) for cell in row] for row in self.map],
        }


def _name_exemplar(exemplar: Exemplar | None) -> dict[str, str] | None:
    return None if exemplar is None else {"defect": exemplar.defect, "source": exemplar.source}


class Predictor:
    """Applies one preprocessing, one engine and one calibration to frames of any size."""

    def __init__(self, bundle: Bundle, engine: Engine, precision: Precision) -> None:
        self.bundle = bundle
        self.engine = engine
        self.precision = precision

    @property
    def model_sha256(self) -> str:
        """Digest of the graph that decides."""
        return self.bundle.model_sha256(self.precision)

    def predict(self, image: NDArray[np.uint8]) -> Prediction:
        """Score one RGB image, uint8 [H, W, 3] of any size."""
        (prediction,) = self.predict_all([(image, WHOLE)])
        return prediction

    def predict_all(self, views: Sequence[tuple[NDArray[np.uint8], View]]) -> list[Prediction]:
        """Score RGB images, each uint8 [H, W, 3] of any size, with one call of the engine.

        Args:
            views: Images, each with what of it is judged.

        Raises:
            UsageError: A view does not fit its image, or masks the map of a model whose score is not read off its map.
        """
        start = time.perf_counter()
        tiles = [to_model_input(tile, self.engine.input_size_hw) for image, view in views for tile in view.cut(image)]
        frames = tiles[0][np.newaxis] if len(tiles) == 1 else np.stack(tiles)
        prepared = time.perf_counter()
        raw = self.engine.infer(frames)
        inferred = time.perf_counter()
        decisions = []
        first = 0
        for image, view in views:
            decisions.append(self._decide(raw, first, image.shape[:2], view))
            first += view.count
        finished = time.perf_counter()
        times = StageTimes(prepared - start, inferred - prepared, finished - inferred)
        return [
            Prediction(score, threshold, evidence, regions, times, view.region)
            for (score, threshold, evidence, regions), (_, view) in zip(decisions, views, strict=True)
        ]

    def check_mask(self, view: View) -> None:
        """Refuse a mask that no picture of the camera could be judged with.

        Args:
            view: Of which the mask is that of the camera's pictures.

        Raises:
            UsageError: Nothing is left free, the region does not lie in the mask, or the score is not read off the map.
        """
        if view.ignored is not None:
            rows, columns = self.bundle.manifest.grid_hw
            self._ignored_cells(view, view.ignored.shape, (rows * view.tiles[0], columns * view.tiles[1]))

    def _decide(
        self, raw: RawScores, first: int, image_hw: tuple[int, int], view: View
    ) -> tuple[float, float, NDArray[np.float32], tuple[Region, ...]]:
        """Score, threshold, map and regions of the tiles from ``first`` on."""
        calibration = self.bundle.calibration
        if view.count == 1 and view.ignored is None:
            score, evidence, nearest = float(raw.score[first]), raw.map[first], raw.nearest[first]
        else:
            tiles = slice(first, first + view.count)
            evidence, nearest = view.join(list(raw.map[tiles])), view.join(list(raw.nearest[tiles]))
            evidence, score = self._score_view(evidence, raw.score[tiles], image_hw, view)
        regions: tuple[Region, ...] = ()
        if not score < calibration.threshold:
            box = view.area(image_hw)
            regions = find_regions(evidence, nearest, box, calibration, self.bundle.exemplars)
        return score, calibration.threshold, evidence, regions

    def _score_view(
        self, evidence: NDArray[np.float32], scores: NDArray[np.float32], image_hw: tuple[int, int], view: View
    ) -> tuple[NDArray[np.float32], float]:
        """The joined map without what is masked, and its score: read off it in the same way as for a whole image."""
        ignored = self._ignored_cells(view, image_hw, evidence.shape)
        top_cells = self.bundle.manifest.top_cells
        if top_cells is None:
            return evidence, float(scores.max())
        if ignored is None:
            counted = evidence.ravel()
        else:
            evidence = np.where(ignored, np.float32(-np.inf), evidence)
            counted = evidence[~ignored]
        top = np.sort(counted)[-top_cells:]  # not a number is sorted to the top
        return evidence, float(top.mean()) + self.bundle.calibration.score_offset

    def _ignored_cells(
        self, view: View, image_hw: tuple[int, ...], grid_hw: tuple[int, ...]
    ) -> NDArray[np.bool_] | None:
        """Cells of the joined map that a mask covers, or None where there is none."""
        if view.ignored is not None and self.bundle.manifest.top_cells is None:
            msg = f"{self.bundle.manifest.detector} does not read its score off its map, so nothing can be masked"
            raise UsageError(msg)
        return view.ignored_cells((image_hw[0], image_hw[1]), (grid_hw[0], grid_hw[1]))


def find_regions(
    evidence: NDArray[np.float32],
    nearest: NDArray[np.int64],
    area: Box,
    calibration: Calibration,
    exemplars: Sequence[Exemplar],
) -> tuple[Region, ...]:
    """Connected cells at or above the cell threshold, or not a number, as boxes on the image, highest peak first.

    Where no cell reaches it, which takes a detector whose score is not read off its map, the highest cell is marked.

    Args:
        evidence: Map, float32 [h, w].
        nearest: int64 [2, h, w], see :class:`~meliad_edge.runtime.engine.RawScores`.
        area: The part of the image that the map covers.
        calibration: Gives the cell threshold.
        exemplars: One per prototype; a prototype without one is not explained.
    """
    # In this order min() keeps the threshold when a cell, and so the maximum, is not a number.
    threshold = min(calibration.cell_threshold, float(evidence.max()))
    marked = (~(evidence < threshold)).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(marked, connectivity=8)
    scale_y, scale_x = area.height / evidence.shape[0], area.width / evidence.shape[1]
    regions = []
    for label in range(1, count):
        left, top, width, height = (int(v) for v in stats[label, :4])
        row, column = np.unravel_index(int(np.where(labels == label, evidence, -np.inf).argmax()), evidence.shape)
        x, y = round(left * scale_x), round(top * scale_y)
        normal, anomalous = (int(plane[row, column]) for plane in nearest)
        regions.append(
            Region(
                x=area.x + x,
                y=area.y + y,
                width=round((left + width) * scale_x) - x,
                height=round((top + height) * scale_y) - y,
                peak=float(evidence[row, column]),
                resembles=exemplars[anomalous] if 0 <= anomalous < len(exemplars) else None,
                differs_from=exemplars[normal] if 0 <= normal < len(exemplars) else None,
            )
        )
    return tuple(sorted(regions, key=lambda region: -region.peak))
