"""What every worker does, in whatever process on whatever machine: score one unit and keep its result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from meliad_edge.archive.folder import ResultFolder
from meliad_edge.archive.items import Archive, Item
from meliad_edge.archive.read import Picture, read_unit
from meliad_edge.bundle import Bundle
from meliad_edge.errors import ImageError
from meliad_edge.precision import Precision
from meliad_edge.runtime.batching import measure_batch_size
from meliad_edge.runtime.choice import EngineChoice
from meliad_edge.runtime.load import make_predictor
from meliad_edge.runtime.predictor import Prediction
from meliad_edge.runtime.view import WHOLE

_LARGEST_BATCH = 8

_REGION = pa.struct([("x", pa.int32()), ("y", pa.int32()), ("width", pa.int32()), ("height", pa.int32())])
RESULT = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("is_anomaly", pa.bool_()),
        pa.field("region", _REGION),
        pa.field("resembles", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("model_sha256", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """What is scored with what; travels to every worker.

    Attributes:
        archive: URL of the images.
        out: URL of the result.
        bundle: The model; not part of the representation.
        precision: Which of its graphs; None leaves that to the bundle.
        engine: Which library.
        threads: Of the engine of one worker.
    """

    archive: str
    out: str
    bundle: Bundle = field(repr=False)
    precision: Precision | None = None
    engine: EngineChoice = "auto"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class UnitDone:
    """What came of a unit.

    Attributes:
        unit: Its number.
        images: In it.
        errors: Of them that could not be decided.
        seconds: From its first byte to its result.
        batch_size: Images that were scored in one call.
    """

    unit: int
    images: int
    errors: int
    seconds: float
    batch_size: int


class UnitScorer:
    """Scores units; made once in each worker, with an engine of its own.

    Args:
        task: What is scored with what.

    Raises:
        BundleError: No engine takes the model.
    """

    def __init__(self, task: ScoringTask) -> None:
        self._files = Archive.open(task.archive).files
        self._folder = ResultFolder.open(task.out)
        self._predictor = make_predictor(
            task.bundle, precision=task.precision, engine=task.engine, threads=task.threads
        )
        golden = [golden.frame for golden in task.bundle.golden]
        self._batch_size = measure_batch_size(self._predictor.engine, golden, _LARGEST_BATCH)

    def score(self, unit: int) -> UnitDone:
        """Score a unit and keep its result; a bad image is a row with its error."""
        start_s = time.perf_counter()
        rows = list(self._rows(self._folder.read_unit(unit)))
        self._folder.write_result(unit, pa.Table.from_pylist(rows, schema=RESULT))
        errors = sum(row["error"] is not None for row in rows)
        return UnitDone(unit, len(rows), errors, time.perf_counter() - start_s, self._batch_size)

    def _rows(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        pictures = read_unit(self._files, items)
        while batch := list(islice(pictures, self._batch_size)):
            good = [image for _, image in batch if not isinstance(image, ImageError)]
            predictions = iter(self._predictor.predict_all([(image, WHOLE) for image in good]) if good else ())
            for item, image in batch:
                yield self._row(item, image, None if isinstance(image, ImageError) else next(predictions))

    def _row(self, item: Item, image: Picture | ImageError, prediction: Prediction | None) -> dict[str, Any]:
        row: dict[str, Any] = {"id": item.id, "model_sha256": self._predictor.model_sha256, "error": None}
        if isinstance(image, ImageError) or prediction is None:
            return {**row, "error": str(image)}
        regions = prediction.regions
        row |= {
            "score": prediction.score,
            "threshold": prediction.threshold,
            "is_anomaly": prediction.is_anomaly,
            "height": image.shape[0],
            "width": image.shape[1],
        }
        if regions:
            worst = regions[0]
            row["region"] = {"x": worst.x, "y": worst.y, "width": worst.width, "height": worst.height}
            row["resembles"] = None if worst.resembles is None else worst.resembles.defect
        return row
