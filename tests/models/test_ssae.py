from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from meliad_edge.data.dataset import Sample
from meliad_edge.data.frames import load_frames
from meliad_edge.data.readers import open_dataset
from meliad_edge.errors import UsageError
from meliad_edge.export.graph import export_graph
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import FittedDetector, TrainingImages
from meliad_edge.models.ssae import (
    CELL_PX,
    DILATIONS,
    Autoencoder,
    SSAENetwork,
    box_cells,
    box_filtered,
    local_contrast,
    reconstruction_loss,
)

QUICK = {"steps": 3, "width": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def features() -> FeatureExtractor:
    return FeatureExtractor(Backbone())


def _texture(count: int, seed: int, size_hw: tuple[int, int] = (64, 96)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(60, 200, (count, *size_hw, 3)).astype(np.uint8)


def _fit(features: FeatureExtractor, seed: int = 0, shots: int = 0) -> FittedDetector:
    images = TrainingImages(_texture(6, 1), _texture(shots, 2))
    return create_detector("ssae", QUICK).fit(images, features, seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_the_equation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    output, clean = rng.uniform(size=(2, 3, 3, 5, 4))
    mask = rng.uniform(size=(3, 1, 5, 4))
    losses = []
    for n in range(3):
        inside, outside, inside_norm, outside_norm = 0.0, 0.0, 0.0, 0.0
        for c, i, j in np.ndindex(3, 5, 4):
            m, difference = mask[n, 0, i, j], output[n, c, i, j] - clean[n, c, i, j]
            inside += (m * difference) ** 2
            outside += ((1 - m) * difference) ** 2
            inside_norm += abs(m)
            outside_norm += abs(1 - m)
        losses.append(0.1 / outside_norm * outside + 0.9 / inside_norm * inside)
    loss = reconstruction_loss(torch.from_numpy(output), torch.from_numpy(clean), torch.from_numpy(mask))
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-9)


@pytest.mark.parametrize("cells", [1, 3])
def test_the_box_filter_is_the_mean_of_the_square_around_each_cell(cells: int) -> None:
    error = np.random.default_rng(cells).uniform(size=(2, 40, 32))
    margin = CELL_PX * (cells // 2)
    expected = np.zeros((2, 5, 4))
    for n, i, j in np.ndindex(2, 5, 4):
        top, left = i * CELL_PX, j * CELL_PX
        square = error[
            n, max(0, top - margin) : top + CELL_PX + margin, max(0, left - margin) : left + CELL_PX + margin
        ]
        expected[n, i, j] = square.mean()
    np.testing.assert_allclose(box_filtered(torch.from_numpy(error), cells).numpy(), expected, rtol=1e-9)


def _slow_contrast(image: NDArray[np.float64]) -> float:
    """Of a [3, 128, 128] image: mean variance in the squares of 24 px around the 16 x 16 cells."""
    variances = []
    for c, i, j in np.ndindex(3, 16, 16):
        variances.append(image[c, max(0, 8 * i - 8) : 8 * i + 16, max(0, 8 * j - 8) : 8 * j + 16].var())
    return float(np.mean(variances))


def test_the_contrast_is_the_mean_local_variance() -> None:
    image = np.random.default_rng(5).uniform(0.2, 0.7, (2, 3, 128, 128))
    contrast = local_contrast(torch.from_numpy(image), cells=3)
    np.testing.assert_allclose(contrast.numpy(), [_slow_contrast(one) for one in image], rtol=1e-9)


def test_the_map_is_the_log_ratio_of_the_box_filtered_error_to_the_usual_one() -> None:
    torch.manual_seed(0)
    network = SSAENetwork((128, 128), width=4).eval()
    frames = _texture(2, 3, (128, 128))
    typical = np.random.default_rng(4).uniform(0.5, 4.0, (16, 16))
    network.typical_error = torch.from_numpy(typical).float()
    images = frames.astype(np.float64).transpose(0, 3, 1, 2) / 255.0
    with torch.inference_mode():
        restored = network.autoencoder(torch.from_numpy(images).float()).numpy()
        score, evidence, nearest = network(torch.from_numpy(frames))
    error = np.mean((images - restored) ** 2, axis=1)
    assert box_cells((128, 128)) == 3
    contrast = [_slow_contrast(image) for image in images]
    for n, i, j in np.ndindex(2, 16, 16):
        square = error[n, max(0, 8 * i - 8) : 8 * i + 16, max(0, 8 * j - 8) : 8 * j + 16]
        floor = 0.1 * typical.mean()
        assert evidence[n, i, j].item() == pytest.approx(
            np.log((square.mean() / (contrast[n] + 1e-4) + floor) / (typical[i, j] + floor)), abs=1e-3
        )
    assert torch.equal(score, evidence.amax((1, 2)))  # by design: the score is the top cell of the map
    assert network.top_cells == 1
    assert network.score_offset == 0.0
    assert nearest.unique().tolist() == [-1]


def test_the_bottleneck_is_five_dilated_5x5_convolutions_that_see_far() -> None:
    network = Autoencoder(width=4).eval()
    convolutions = [layer for layer in network.bottleneck.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert DILATIONS == (1, 2, 4, 8, 16)
    assert [layer.dilation for layer in convolutions] == [(d, d) for d in DILATIONS]
    assert {layer.kernel_size for layer in convolutions} == {(5, 5)}
    images = torch.rand(1, 3, 64, 96, requires_grad=True)
    network(images)[0, :, 32, 48].sum().backward()
    assert images.grad is not None
    reached = images.grad.abs().sum((0, 1)) > 0
    assert reached.any(1).float().mean() > 0.9
    assert reached.any(0).float().mean() > 0.9


def test_the_same_seed_gives_the_same_network_and_labels_are_not_used(features: FeatureExtractor) -> None:
    first, again, other = (_fit(features, seed, shots).network.state_dict() for seed, shots in ((1, 0), (1, 3), (2, 0)))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["typical_error"], other["typical_error"])


def test_the_usual_error_is_that_of_the_normal_images(features: FeatureExtractor) -> None:
    network = _fit(features).network
    assert isinstance(network, SSAENetwork)
    with torch.inference_mode():
        errors = torch.stack([network.relative_error(torch.from_numpy(frame[None]))[0] for frame in _texture(6, 1)])
    np.testing.assert_allclose(network.typical_error.numpy(), errors.mean(0).numpy(), rtol=1e-3)  # type: ignore[operator]


def test_what_is_saved_builds_the_same_network_and_onnx_runtime_agrees(features: FeatureExtractor) -> None:
    network = _fit(features).network
    rebuilt = (
        create_detector("ssae").build(features.backbone, (64, 96), network.state_dict(), network.describe()).eval()
    )
    frames = _texture(3, 9)
    with torch.inference_mode():
        expected = network(torch.from_numpy(frames))
        for ours, theirs in zip(expected, rebuilt(torch.from_numpy(frames)), strict=True):
            assert torch.equal(ours, theirs)
    session = onnxruntime.InferenceSession(export_graph(rebuilt).SerializeToString())
    for ours, theirs in zip(expected, session.run(None, {"frames": frames}), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 10, 11])
def test_any_number_of_steps_trains(features: FeatureExtractor, steps: int) -> None:
    detector = create_detector("ssae", {**QUICK, "steps": steps})
    facts = detector.fit(TrainingImages(_texture(2, 1), _texture(0, 2)), features, seed=0).facts
    assert facts["training_steps"] == steps
    assert np.isfinite(facts["final_loss"])


def test_an_option_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="option width = 3 is not allowed"):
        create_detector("ssae", {"width": 3})


def _auroc(features: FeatureExtractor, normal: list[Path], defective: list[Path], seed: int) -> float:
    """Trained for a few seconds on 100 normal images of 64 px; of 150 other normal and up to 150 defective ones."""
    rng = np.random.default_rng(seed)
    samples = [Sample(normal[i], "good", "any") for i in rng.permutation(len(normal))[:250]]
    samples += [Sample(defective[i], "defect", "any") for i in rng.permutation(len(defective))[:150]]
    frames = load_frames(samples, (64, 64), "reading").frames
    network = (
        create_detector("ssae", {"steps": 100, "width": 16})
        .fit(TrainingImages(frames[:100], frames[:0]), features, seed=seed)
        .network
    )
    with torch.inference_mode():
        scores = torch.cat([network(part)[0] for part in torch.from_numpy(frames[100:]).split(50)])
    return float(roc_auc_score([sample.is_anomaly for sample in samples[100:]], scores.numpy()))


def test_it_tells_damaged_solar_cells_from_whole_ones(features: FeatureExtractor) -> None:
    pytest.importorskip("elpv_dataset")
    samples = open_dataset("elpv").samples
    normal = [sample.path for sample in samples if not sample.is_anomaly]
    defective = [sample.path for sample in samples if sample.is_anomaly]
    aurocs = [_auroc(features, normal, defective, seed) for seed in (0, 1, 2)]
    assert min(aurocs) > 0.6, aurocs  # chance is 0.5
