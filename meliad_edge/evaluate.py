"""Measure a run on the test images it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge.data.dataset import Sample
from meliad_edge.data.frames import LoadedFrames, load_frames
from meliad_edge.data.images import read_image, read_mask
from meliad_edge.errors import DataError
from meliad_edge.interpretability import Interpretability, measure_interpretability
from meliad_edge.metrics import ImageMetrics, PixelMetrics, image_metrics, pixel_metrics
from meliad_edge.run import Run
from meliad_edge.runtime.engine import RawScores, infer_all
from meliad_edge.runtime.torch_engine import TorchEngine


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything measured on the test images.

    Attributes:
        images: The test images at model size, with the samples they came from.
        raw: Raw scores and maps, in the same order.
        is_anomaly: Ground truth, [n].
        masks: Ground-truth masks at model size where the data set has them, by index.
        mask_errors: One message for each mask that does not fit its image, or shows no defect; its image has no part in
            pixel metrics.
        image: Image metrics.
        pixel: Pixel metrics, None where the data set has no masks.
        false_alarms: Normal test images at or above the threshold.
        misses: Anomalous test images below the threshold.
        interpretability: How well the maps explain; None where it was not asked for.
    """

    images: LoadedFrames
    raw: RawScores
    is_anomaly: NDArray[np.bool_]
    masks: dict[int, NDArray[np.bool_]]
    mask_errors: tuple[str, ...]
    image: ImageMetrics
    pixel: PixelMetrics | None
    false_alarms: int
    misses: int
    interpretability: Interpretability | None = None

    def to_dict(self) -> dict[str, Any]:
        """One flat object of JSON values with anomalib's metric names."""
        return {
            **self.image.to_dict(),
            **(self.pixel.to_dict() if self.pixel is not None else {}),
            "false_alarms": self.false_alarms,
            "misses": self.misses,
            "unreadable_images": len(self.images.errors),
            "unusable_masks": len(self.mask_errors),
            **(self.interpretability.to_dict() if self.interpretability is not None else {}),
        }


def evaluate(run: Run, *, interpretability: bool = False) -> Evaluation:
    """Score the test images of a run with the trained network and compare with the ground truth.

    Pixel metrics are computed at the model's input size, over all test images, where at least one anomaly
    has a mask; an anomaly without one is left out of them.

    Args:
        run: What to measure.
        interpretability: Also measure how well the maps explain, which takes a minute or so.

    Raises:
        DataError: The test set lacks normal or anomalous images.
    """
    test = run.split.test
    anomalies = sum(sample.is_anomaly for sample in test)
    if anomalies == 0 or anomalies == len(test):
        msg = (
            f"the test set has {len(test) - anomalies} normal and {anomalies} anomalous images; it needs both: "
            "add some, or fit again with fewer --shots where all defects were learned from"
        )
        raise DataError(msg)
    loaded = load_frames(test, run.network.input_hw, "reading test images")
    raw = infer_all(TorchEngine(run.network, run.config.feature_cache, use_kernel=True), loaded.frames, "scoring")
    is_anomaly = np.array([sample.is_anomaly for sample in loaded.samples])
    masks, mask_errors = _read_masks(loaded.samples, run.network.input_hw)
    alarms = raw.score >= run.calibration.threshold
    return Evaluation(
        images=loaded,
        raw=raw,
        is_anomaly=is_anomaly,
        masks=masks,
        mask_errors=mask_errors,
        image=image_metrics(raw.score, is_anomaly),
        pixel=_pixel_metrics(raw.map, is_anomaly, masks, run.network.input_hw) if masks else None,
        false_alarms=int(np.count_nonzero(alarms & ~is_anomaly)),
        misses=int(np.count_nonzero(~alarms & is_anomaly)),
        interpretability=measure_interpretability(run, loaded.frames, raw, is_anomaly, masks)
        if interpretability
        else None,
    )


def _read_masks(
    samples: tuple[Sample, ...], size_hw: tuple[int, int]
) -> tuple[dict[int, NDArray[np.bool_]], tuple[str, ...]]:
    masks, errors = {}, []
    for index, sample in enumerate(samples):
        if sample.mask_path is None:
            continue
        try:
            mask = read_mask(sample.mask_path, read_image(sample.path).shape[:2])
        except DataError as error:
            errors.append(str(error))
        else:
            if sample.is_anomaly and not mask.any():
                errors.append(f"mask {sample.mask_path} of {sample.path} has no defective pixel; draw the defect")
            else:
                masks[index] = _at_model_size(mask, size_hw)
    return masks, tuple(errors)


def _at_model_size(mask: NDArray[np.bool_], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """By nearest neighbours; a defect that falls between them keeps every pixel that it touches."""
    nearest = cv2.resize(mask.astype(np.uint8), size_hw[::-1], interpolation=cv2.INTER_NEAREST) > 0
    if nearest.any() or not mask.any():
        return np.asarray(nearest)
    return np.asarray(cv2.resize(mask.astype(np.float32), size_hw[::-1], interpolation=cv2.INTER_AREA) > 0)


@dataclass(frozen=True, slots=True)
class _EnlargedMaps(Sequence[NDArray[np.float32]]):
    """Maps at model size, each enlarged when it is read: all of them would fill the memory."""

    maps: NDArray[np.float32]
    indices: list[int]
    size_hw: tuple[int, int]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.float32]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[NDArray[np.float32]]: ...

    def __getitem__(self, index: int | slice) -> NDArray[np.float32] | Sequence[NDArray[np.float32]]:
        if isinstance(index, slice):
            return _EnlargedMaps(self.maps, self.indices[index], self.size_hw)
        enlarged = cv2.resize(self.maps[self.indices[index]], self.size_hw[::-1], interpolation=cv2.INTER_LINEAR)
        return np.asarray(enlarged, dtype=np.float32)


def _pixel_metrics(
    maps: NDArray[np.float32],
    is_anomaly: NDArray[np.bool_],
    masks: dict[int, NDArray[np.bool_]],
    size_hw: tuple[int, int],
) -> PixelMetrics:
    empty = np.zeros(size_hw, np.bool_)
    measured = [index for index in range(len(maps)) if index in masks or not is_anomaly[index]]
    return pixel_metrics(_EnlargedMaps(maps, measured, size_hw), [masks.get(index, empty) for index in measured])
