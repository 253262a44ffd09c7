from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meliad_edge.models.meliad_network import LENGTH_DAMPING, length_damping
from meliad_edge.models.prototypes import choose_prototypes, nearest_distance, nearest_patch
from meliad_edge.models.whitening import fit_whitening


def _patches(count: int, depth: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, depth)).astype(np.float32)


def test_whitened_patches_have_no_mean_and_unit_variance_in_every_direction() -> None:
    random = np.random.default_rng(0)
    patches = (random.normal(size=(5000, 12)) @ random.normal(size=(12, 12)) * 3.0 + 100.0).astype(np.float32)
    whitened = fit_whitening(patches, shrinkage=0.0)(patches)
    assert np.abs(whitened.mean(axis=0)).max() < 1e-2
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(12), atol=2e-2)


def test_whitening_in_chunks_is_whitening_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = _patches(1000, 8) * np.arange(1, 9, dtype=np.float32) + 5.0
    whole = fit_whitening(patches)
    monkeypatch.setattr("meliad_edge.models.whitening._CHUNK", 64)
    parts = fit_whitening(patches)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-5)
    np.testing.assert_allclose(np.abs(parts(patches)), np.abs(whole(patches)), atol=1e-3)


def test_shrinkage_bounds_directions_without_data() -> None:
    patches = np.zeros((100, 4), np.float32)
    patches[:, 0] = np.linspace(-1.0, 1.0, 100)
    whitening = fit_whitening(patches, shrinkage=0.03)
    assert np.isfinite(whitening.matrix).all()
    assert np.linalg.norm(whitening.matrix, 2) < 50.0


def test_distances_are_those_of_mahalanobis() -> None:
    patches = _patches(400, 5) @ np.diag([1.0, 2.0, 3.0, 4.0, 5.0]).astype(np.float32)
    whitening = fit_whitening(patches, shrinkage=0.0)
    covariance = np.cov(patches.T, bias=True)
    a, b = patches[:50], patches[50:100]
    difference = (a - b).astype(np.float64)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", difference, np.linalg.inv(covariance), difference))
    np.testing.assert_allclose(np.linalg.norm(whitening(a) - whitening(b), axis=1), expected, rtol=1e-3)


def test_damping_keeps_the_direction_and_pulls_lengths_together() -> None:
    vectors = torch.from_numpy(_patches(50, 6)) * torch.logspace(-0.5, 2, 50)[:, None]
    damped = vectors * length_damping(vectors.norm(dim=1, keepdim=True), torch.tensor(2.0))
    cosine = torch.nn.functional.cosine_similarity(vectors, damped)
    assert torch.allclose(cosine, torch.ones(50), atol=1e-5)
    expected = vectors.norm(dim=1) * (vectors.norm(dim=1) / 2.0) ** -LENGTH_DAMPING
    assert torch.allclose(damped.norm(dim=1), expected, rtol=1e-4)


def test_damping_of_nothing_is_nothing() -> None:
    zeros = torch.zeros(3, 4)
    assert torch.equal(zeros * length_damping(zeros.norm(dim=1, keepdim=True), torch.tensor(1.0)), zeros)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9), st.integers(0, 999))
def test_nearest_against_every_pair(count: int, prototypes: int, depth: int, seed: int) -> None:
    a, b = _patches(count, depth, seed), _patches(prototypes, depth, seed + 1)
    pairs = np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)
    np.testing.assert_allclose(nearest_distance(a, b), pairs.min(axis=1), atol=2e-3)
    chosen = nearest_patch(b, a)
    np.testing.assert_allclose(pairs[chosen, np.arange(prototypes)], pairs.min(axis=0), atol=2e-3)


def test_nearest_keeps_the_shape_and_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    patches, prototypes = _patches(120, 4).reshape(2, 5, 12, 4), _patches(7, 4, 1)
    distance, index = nearest_distance(patches, prototypes), nearest_patch(prototypes, patches.reshape(-1, 4))
    assert distance.shape == (2, 5, 12)
    monkeypatch.setattr("meliad_edge.models.prototypes._CHUNK", 11)
    np.testing.assert_allclose(nearest_distance(patches, prototypes), distance, atol=1e-5)
    np.testing.assert_array_equal(nearest_patch(prototypes, patches.reshape(-1, 4)), index)


def test_few_patches_are_their_own_prototypes() -> None:
    patches = _patches(5, 3)
    np.testing.assert_array_equal(choose_prototypes(patches, 5, seed=0), patches)


def test_prototypes_find_the_groups_and_the_seed_decides() -> None:
    centres = np.array([[0, 0], [10, 0], [0, 10]], np.float32)
    patches = np.repeat(centres, 100, axis=0) + 0.1 * _patches(300, 2)
    prototypes = choose_prototypes(patches, 12, seed=1)
    assert prototypes.shape == (12, 2)
    assert prototypes.dtype == np.float32
    assert nearest_distance(centres, prototypes).max() < 0.3
    np.testing.assert_array_equal(prototypes, choose_prototypes(patches, 12, seed=1))
