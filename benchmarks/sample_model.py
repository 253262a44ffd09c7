"""The default detector on real images, small enough to be fitted in seconds: what latencies are measured with.

Content matters: the kernel computes exactly only what a coarse product leaves in doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from meliad_edge import __version__
from meliad_edge.bundle import Bundle, GoldenFrame, Manifest, open_bundle, write_bundle
from meliad_edge.calibrate import calibrate
from meliad_edge.data.frames import load_frames
from meliad_edge.data.readers import open_dataset
from meliad_edge.data.split import few_shot_split
from meliad_edge.export.graph import export_graph
from meliad_edge.export.lower import Replay, lower
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import DEFAULT_BACKBONE, load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import PrototypeNetwork, TrainingImages
from meliad_edge.precision import ParityLimits, Precision
from meliad_edge.runtime.engine import infer_all
from meliad_edge.runtime.torch_engine import TorchEngine

_NORMALS, _SHOTS, _TEST, _GOLDEN = 100, 10, 32, 16


@dataclass(frozen=True, slots=True)
class SampleModel:
    """A fitted network and frames it has not seen.

    Attributes:
        network: In evaluation mode.
        frames: uint8 RGB [n, H, W, 3] at model size, normal and anomalous ones in turn.
        data: What it was fitted on.
    """

    network: PrototypeNetwork
    frames: NDArray[np.uint8]
    data: str


def sample_model(size: int) -> SampleModel:
    """Fit the default detector on a part of ELPV, or on noise where the extra demo is not installed.

    Args:
        size: Height and width of the input in pixels.
    """
    if find_spec("elpv_dataset") is None:
        noise = np.random.default_rng(0).integers(0, 256, (_NORMALS + _SHOTS + _TEST, size, size, 3), dtype=np.uint8)
        normals, shots, test = np.split(noise, [_NORMALS, _NORMALS + _SHOTS])
        data = "noise"
    else:
        split = few_shot_split(open_dataset("elpv"), shots=_SHOTS, seed=0)
        by_kind = ([sample for sample in split.test if sample.is_anomaly == kind] for kind in (False, True))
        in_turn = [sample for pair in zip(*by_kind, strict=False) for sample in pair][:_TEST]
        normals, shots, test = (
            load_frames(samples, (size, size), "reading images").frames
            for samples in (split.train_normal[:_NORMALS], split.shots, in_turn)
        )
        data = "elpv"
    detector = create_detector("meliad")
    features = FeatureExtractor(load_backbone(strides=detector.strides, even_light=detector.even_light))
    network = detector.fit(TrainingImages(normals, shots), features, seed=0).network
    assert isinstance(network, PrototypeNetwork)
    return SampleModel(network, test, data)


def sample_bundle(model: SampleModel, path: Path, precisions: Sequence[Precision]) -> Bundle:
    """The sample model as a bundle, with frames it has not seen as golden frames.

    Args:
        model: The sample model.
        path: Where the bundle goes.
        precisions: Of its graphs; FP32 among them.
    """
    network, frames = model.network, model.frames
    names = [f"frame {index}" for index in range(len(frames))]
    reference = infer_all(TorchEngine(network), frames, "pytorch")
    # Nothing is decided here: every second frame is normal, and the threshold is one that none of them reaches.
    calibration = calibrate([*map(float, reference.score[::2]), float(reference.score.max()) + 1.0])
    graph = export_graph(network)
    replay = Replay(frames, names, reference, calibration)
    limits = ParityLimits(score=1.0, map=10.0)
    models: dict[Precision, bytes] = {
        precision: (
            graph if precision == "fp32" else lower(graph, precision, frames, replay, limits).model
        ).SerializeToString()
        for precision in precisions
    }
    manifest = Manifest(
        name="sample",
        detector="meliad",
        backbone=DEFAULT_BACKBONE,
        input_hw=network.input_hw,
        grid_hw=network.grid_hw,
        top_cells=network.top_cells,
        precisions=dict.fromkeys(models, limits),
        created_by=f"meliad-edge {__version__}",
        dataset="benchmark",
        licence="none",
        train_normals=_NORMALS,
        shots=_SHOTS,
    )
    golden = [
        GoldenFrame(names[i], "unknown", frames[i], float(reference.score[i]), reference.map[i]) for i in range(_GOLDEN)
    ]
    write_bundle(path, manifest, models, calibration, golden, ())
    return open_bundle(path)


def write_video(frames: Sequence[NDArray[np.uint8]], path: Path) -> Path:
    """A file of MJPEG at 25 frames per second."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path
