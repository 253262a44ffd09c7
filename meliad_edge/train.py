"""Fit a detector: read, split, train, calibrate, and keep what later verbs need in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from meliad_edge.calibrate import calibrate
from meliad_edge.config import FitConfig
from meliad_edge.data.dataset import Sample
from meliad_edge.data.frames import LoadedFrames, load_frames
from meliad_edge.data.readers import open_dataset
from meliad_edge.data.split import few_shot_split
from meliad_edge.exemplars import Exemplar, cut_exemplar
from meliad_edge.input_choice import choose_input_size
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import STRIDES, load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.half_weights import round_weights_to_half
from meliad_edge.models.network import FittedDetector, TrainingImages
from meliad_edge.run import Run, save_run
from meliad_edge.runtime.engine import infer_all
from meliad_edge.runtime.torch_engine import TorchEngine

Report = Callable[[str, str], None]

# More normals than this bring the prototypes nothing and only fill memory: 0.6 MB each at 256 x 256.
_MAX_NORMAL_IMAGES = 3000
_MAX_NORMAL_PIXELS = _MAX_NORMAL_IMAGES * 256 * 256


def fit(config: FitConfig, out: Path, report: Report) -> Run:
    """Train a detector as the settings say and write its run folder.

    Args:
        config: Settings.
        out: Run folder to write.
        report: Receives a topic and a sentence for each fact worth telling.

    Raises:
        DataError: The data set cannot be used.
        ModelError: No weights for the backbone.
        UsageError: Unknown detector.
    """
    detector = create_detector(config.detector, config.options)
    dataset = open_dataset(config.data)
    split = few_shot_split(dataset, shots=config.shots, seed=config.seed, shot_class=config.shot_class)
    features = FeatureExtractor(
        load_backbone(config.backbone, config.weights, detector.strides or STRIDES, even_light=detector.even_light),
        config.feature_cache,
    )
    anomalies = sum(sample.is_anomaly for sample in split.test)
    report(
        "data",
        f"{dataset.name}: {len(split.train_normal)} normal images, {len(split.shots)} labelled defects to learn from; "
        f"{len(split.calibration)} normals for the threshold; {len(split.test) - anomalies} + {anomalies} held out",
    )
    chosen = choose_input_size(config, split, detector, features)
    report("input", str(chosen))
    size_hw = chosen.size_hw
    normal = load_frames(_at_most(split.train_normal, config.seed, size_hw), size_hw, "reading normals")
    shots = load_frames(split.shots, size_hw, "reading defects")
    held_out = load_frames(split.calibration, size_hw, "reading calibration")
    for loaded in (normal, shots, held_out):
        for error in loaded.errors:
            report("skipped", error)
    fitted = detector.fit(TrainingImages(normal.frames, shots.frames), features, seed=config.seed)
    round_weights_to_half(fitted.network)
    scores = infer_all(
        TorchEngine(fitted.network, config.feature_cache, use_kernel=True), held_out.frames, "calibrating"
    ).score
    calibration = calibrate(
        scores,
        target_false_alarm_rate=config.false_alarm_rate,
        score_offset=fitted.network.score_offset,
    )
    run = Run(
        config=config,
        dataset=dataset.name,
        licence=dataset.licence if config.licence is None else config.licence,
        split=split,
        network=fitted.network,
        calibration=calibration,
        exemplars=_exemplars(fitted, normal, shots),
        facts={
            **fitted.facts,
            "input_hw": list(size_hw),
            "unreadable_images": sum(len(part.errors) for part in (normal, shots, held_out)),
        },
    )
    save_run(run, out)
    return run


def _at_most(samples: Sequence[Sample], seed: int, size_hw: tuple[int, int]) -> Sequence[Sample]:
    most = min(_MAX_NORMAL_IMAGES, _MAX_NORMAL_PIXELS // (size_hw[0] * size_hw[1]))
    if len(samples) <= most:
        return samples
    chosen = np.random.default_rng(seed).choice(len(samples), most, replace=False)
    return [samples[index] for index in np.sort(chosen)]


def _exemplars(fitted: FittedDetector, normal: LoadedFrames, shots: LoadedFrames) -> tuple[Exemplar, ...]:
    sources = {"normal": normal, "shots": shots}
    return tuple(
        cut_exemplar(
            sources[site.kind].frames[site.image],
            site.cell,
            fitted.network.grid_hw,
            sources[site.kind].samples[site.image].defect,
            sources[site.kind].samples[site.image].path.name,
        )
        for site in fitted.sites
    )
