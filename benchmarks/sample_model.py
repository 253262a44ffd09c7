"""The default detector on real images, small enough to be fitted in seconds: what latencies are measured with.

Content matters: the kernel computes exactly only what a coarse product leaves in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from meliad_edge.data.frames import load_frames
from meliad_edge.data.readers import open_dataset
from meliad_edge.data.split import few_shot_split
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import PrototypeNetwork, TrainingImages

_NORMALS, _SHOTS, _TEST = 100, 10, 32


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
