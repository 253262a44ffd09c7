"""Fit a detector: read, split, train, calibrate, and keep what later verbs need in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from meliad_edge.calibrate import calibrate, outlier
from meliad_edge.config import FitConfig
from meliad_edge.data.dataset import FewShotSplit, Sample
from meliad_edge.data.doubts import doubts_about
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

# More normals than this bring the prototypes nothing and only fill memory: 0.8 MB each at 256 x 256.
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
    create_detector(config.detector, config.options)  # what is wrong with them is said before images are read
    dataset = open_dataset(config.data)
    split = few_shot_split(dataset, shots=config.shots, seed=config.seed, shot_class=config.shot_class)
    features = open_features(config)
    anomalies = sum(sample.is_anomaly for sample in split.test)
    report(
        "data",
        f"{dataset.name}: {len(split.train_normal)} normal images, {len(split.shots)} labelled defects to learn from; "
        f"{len(split.calibration)} normals for the threshold; {len(split.test) - anomalies} + {anomalies} held out",
    )
    for doubt in doubts_about(split):
        report("warning", doubt)
    chosen = choose_input_size(config, split.train_normal)
    report("input", str(chosen))
    licence = dataset.licence if config.licence is None else config.licence
    run = fit_split(config, split, chosen.size_hw, features, dataset=dataset.name, licence=licence, report=report)
    save_run(run, out)
    return run


def open_features(config: FitConfig) -> FeatureExtractor:
    """The backbone of the settings, as their detector takes it.

    Raises:
        ModelError: No weights for the backbone.
        UsageError: Unknown detector.
    """
    detector = create_detector(config.detector, config.options)
    backbone = load_backbone(
        config.backbone, config.weights, detector.strides or STRIDES, even_light=detector.even_light
    )
    return FeatureExtractor(backbone, config.feature_cache)


def fit_split(
    config: FitConfig,
    split: FewShotSplit,
    size_hw: tuple[int, int],
    features: FeatureExtractor,
    *,
    dataset: str,
    licence: str,
    report: Report,
    always: Sequence[Sample] = (),
) -> Run:
    """Train and calibrate a detector on a split that is already drawn; nothing is written.

    Args:
        config: Settings.
        split: Which image is in which set.
        size_hw: Size of the model's input in pixels.
        features: Of the backbone of the settings, see :func:`open_features`.
        dataset: Name of the data set.
        licence: Of its images.
        report: Receives a topic and a sentence for each fact worth telling.
        always: Training normals that are learned from even where there are more than are used.

    Raises:
        DataError: None of the images of a set can be read.
        UsageError: Unknown detector.
    """
    detector = create_detector(config.detector, config.options)
    normals = _at_most(split.train_normal, config.seed, size_hw, always)
    if len(normals) < len(split.train_normal):
        report(
            "normals",
            f"{len(normals):,} of {len(split.train_normal):,} are learned from, as many as memory is kept for",
        )
    normal = load_frames(normals, size_hw, "reading normals")
    shots = load_frames(split.shots, size_hw, "reading defects")
    held_out = load_frames(split.calibration, size_hw, "reading calibration")
    for loaded in (normal, shots, held_out):
        for error in loaded.errors:
            report("skipped", error)
    fitted = detector.fit(TrainingImages(normal.frames, shots.frames), features, seed=config.seed)
    round_weights_to_half(fitted.network)
    engine = TorchEngine(fitted.network, config.feature_cache, use_kernel=True)
    scores = infer_all(engine, held_out.frames, "calibrating").score
    calibration = calibrate(
        scores,
        target_false_alarm_rate=config.false_alarm_rate,
        score_offset=fitted.network.score_offset,
    )
    if (index := outlier(scores)) is not None:
        report(
            "warning",
            f"{held_out.samples[index].path} scores {scores[index]:.2f}, far above all other normal images for the "
            "threshold; look at it, and fit again without it if it shows a defect",
        )
    if len(shots.frames):
        alarms = int(np.count_nonzero(infer_all(engine, shots.frames, "defects again").score >= calibration.threshold))
        report(
            "defects", f"{alarms} of {len(shots.frames)} reach the threshold; they were learned from, others score less"
        )
    return Run(
        config=config,
        dataset=dataset,
        licence=licence,
        split=split,
        network=fitted.network,
        calibration=calibration,
        exemplars=_exemplars(fitted, normal, shots),
        learned_normals=len(normal.frames),
        learned_shots=len(shots.frames),
        facts={
            **fitted.facts,
            "input_hw": list(size_hw),
            "unreadable_images": sum(len(part.errors) for part in (normal, shots, held_out)),
        },
    )


def _at_most(
    samples: Sequence[Sample], seed: int, size_hw: tuple[int, int], always: Sequence[Sample]
) -> Sequence[Sample]:
    most = min(_MAX_NORMAL_IMAGES, _MAX_NORMAL_PIXELS // (size_hw[0] * size_hw[1]))
    if len(samples) <= most:
        return samples
    kept = set(always)
    others = [sample for sample in samples if sample not in kept]
    chosen = np.random.default_rng(seed).choice(len(others), max(most - len(always), 0), replace=False)
    return [*(others[index] for index in np.sort(chosen)), *always]


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
