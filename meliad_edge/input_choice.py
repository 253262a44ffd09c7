"""The size of the model's input, chosen from the training images and the shots alone [ours]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meliad_edge.config import FitConfig
from meliad_edge.data.dataset import FewShotSplit, Sample
from meliad_edge.data.frames import load_frames
from meliad_edge.data.images import read_image_size
from meliad_edge.data.input_size import candidate_sizes, common_aspect_ratio, in_words
from meliad_edge.errors import ImageError
from meliad_edge.metrics import image_metrics
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import Detector, TrainingImages
from meliad_edge.runtime.engine import infer_all
from meliad_edge.runtime.torch_engine import TorchEngine

# A larger input costs time on every frame, so it has to be clearly better on the few images there are.
MARGIN = 0.02
# With fewer there is nothing to compare with.
FEWEST_SHOTS = 4
FEWEST_NORMALS = 12
_HEADERS = 200
# A third of them is scored, the rest is fitted on.
_NORMALS = 180


@dataclass(frozen=True, slots=True)
class InputSize:
    """The size of the model's input.

    Attributes:
        size_hw: Height and width in pixels, multiples of 32.
        reason: Where it comes from, to follow the size in a sentence.
    """

    size_hw: tuple[int, int]
    reason: str

    def __str__(self) -> str:
        """Width, height and reason, for reports."""
        return f"{in_words(self.size_hw)} pixels, {self.reason}"


def choose_input_size(
    config: FitConfig, split: FewShotSplit, detector: Detector, features: FeatureExtractor
) -> InputSize:
    """Take the size that was set, or else the smallest candidate that no larger one clearly beats.

    Candidates are those of :func:`~meliad_edge.data.input_size.candidate_sizes`. They are compared by the AUROC of the
    detector itself in two folds over the shots: fitted on half of them, it tells the other half from training normals
    that it was not fitted on. The smallest is taken without comparison for a detector that is slow to fit, and with
    fewer than 4 shots or 12 training normals. Calibration and test images are never read.

    Args:
        config: Settings.
        split: Of it, training normals and shots are used.
        detector: What is to be fitted.
        features: Of its backbone.

    Raises:
        DataError: None of the training normals, or none of the shots, can be read.
    """
    if config.image_size is not None:
        return InputSize((config.image_size, config.image_size), "as set")
    order = np.random.default_rng(config.seed).permutation(len(split.train_normal))
    drawn = [split.train_normal[index] for index in order]
    image_sizes = _image_sizes(drawn[:_HEADERS])
    candidates = candidate_sizes(image_sizes, config.budget)
    ratio = common_aspect_ratio(image_sizes)
    shape = "square, the images differ in aspect ratio" if ratio is None else "close to the images' aspect ratio"
    best = candidates[0]
    if len(candidates) == 1 or not detector.chooses_input_size:
        return InputSize(best, shape)
    aurocs: dict[tuple[int, int], float] = {}
    for size_hw in candidates:
        auroc = _left_out_auroc(config, drawn[:_NORMALS], split.shots, detector, features, size_hw)
        if auroc is None:
            lacking = "labelled defects" if len(split.shots) < FEWEST_SHOTS else "images that can be read"
            return InputSize(best, f"{shape}; too few {lacking} to compare it with {in_words(candidates[1])}")
        aurocs[size_hw] = auroc
        if auroc > aurocs[best] + MARGIN:
            best = size_hw
    others = " and ".join(f"{aurocs[size]:.3f} at {in_words(size)}" for size in candidates if size != best)
    return InputSize(best, f"{shape}; AUROC on left-out shots {aurocs[best]:.3f} against {others}")


def _image_sizes(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Heights and widths; a file that cannot be read is reported when it is to be decoded."""
    sizes = []
    for sample in samples:
        try:
            sizes.append(read_image_size(sample.path))
        except ImageError:
            continue
    return sizes


def _left_out_auroc(
    config: FitConfig,
    normals: Sequence[Sample],
    shots: Sequence[Sample],
    detector: Detector,
    features: FeatureExtractor,
    size_hw: tuple[int, int],
) -> float | None:
    """Mean AUROC of two folds over the shots; None with too few images that can be read."""
    if len(shots) < FEWEST_SHOTS or len(normals) < FEWEST_NORMALS:
        return None
    description = f"trying {in_words(size_hw)}"
    normal = load_frames(normals, size_hw, description).frames
    anomalous = load_frames(shots, size_hw, description).frames
    if len(anomalous) < FEWEST_SHOTS or len(normal) < FEWEST_NORMALS:
        return None
    scored, fitted_on = np.split(normal, [len(normal) // 3])
    halves = anomalous[::2], anomalous[1::2]
    aurocs = []
    for seen, left_out in (halves, halves[::-1]):
        fitted = detector.fit(TrainingImages(fitted_on, seen), features, seed=config.seed)
        engine = TorchEngine(fitted.network, config.feature_cache, use_kernel=True)
        scores = infer_all(engine, np.concatenate([scored, left_out]), description).score
        is_anomaly = np.arange(len(scores)) >= len(scored)
        aurocs.append(image_metrics(scores, is_anomaly, resamples=1).image_auroc)
    return float(np.mean(aurocs))
