"""The Gaussians of places against their definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meliad_edge.models.places import MAIN_DIRECTIONS, PRIOR_IMAGES, fit_places, place_deviation, place_features


def _features(count: int, seed: int, *, height: int = 3, width: int = 2, channels: int = 80) -> np.ndarray:
    """Correlated channels, and at every place another mean and another spread."""
    shared = np.random.default_rng(99)
    mixing = shared.normal(size=(channels, channels))
    means = 4.0 * shared.normal(size=(height, width, channels))
    spreads = shared.uniform(0.2, 3.0, (height, width, channels))
    drawn = np.random.default_rng(seed).normal(size=(count, height, width, channels))
    return np.asarray((means + spreads * drawn) @ mixing, dtype=np.float32)


def test_deviations_follow_the_equations() -> None:
    fitted_on, others = _features(200, 1), _features(5, 2)
    places = fit_places(fitted_on)
    projection = places.projection.astype(np.float64)
    projected = fitted_on.reshape(-1, 80).astype(np.float64) @ projection.T
    covariance = np.cov(projected.T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    assert 0.3 < np.diag(covariance).min() < np.diag(covariance).max() < 1.0
    found = places(others)
    for row in range(3):
        for column in range(2):
            here = fitted_on[:, row, column].astype(np.float64) @ projection.T
            deviations = here - here.mean(axis=0)
            covariance = deviations.T @ deviations + PRIOR_IMAGES * np.eye(64)
            variances, vectors = np.linalg.eigh(covariance / (len(here) - 1 + PRIOR_IMAGES))
            variances[:-MAIN_DIRECTIONS] = 1.0 / np.mean(1.0 / variances[:-MAIN_DIRECTIONS])
            precision = vectors @ np.diag(1.0 / variances) @ vectors.T
            for image in range(len(others)):
                deviation = others[image, row, column].astype(np.float64) @ projection.T - here.mean(axis=0)
                expected = np.sqrt(deviation @ precision @ deviation)
                assert found[image, row, column] == pytest.approx(expected, rel=1e-3)


def test_what_is_normal_elsewhere_is_not_normal_here() -> None:
    places = fit_places(_features(100, 1))
    others = _features(20, 2)
    in_place, moved = places(others), places(others[:, ::-1])
    assert moved[:, [0, 2]].mean() > 1.2 * in_place[:, [0, 2]].mean()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_leave_the_covariance_of_all_places(count: int) -> None:
    fitted_on = _features(count, 1)
    deviations = fit_places(fitted_on)(_features(10, 2))
    assert np.isfinite(deviations).all()
    assert deviations.min() > 0


def test_a_deviation_never_has_the_root_of_less_than_nothing() -> None:
    """All of it in a main direction that is endlessly wide."""
    main = torch.zeros(1, 8, 2)
    main[0, 0, 0] = 1.0 + 1e-6
    deviation = torch.zeros(1, 3, 8)
    deviation[..., 0] = 5.0
    assert torch.equal(place_deviation(deviation, main, torch.ones(1)), torch.zeros(1, 3))


def test_features_stay_where_they_are() -> None:
    finer, fine = torch.arange(16.0).view(1, 1, 4, 4), torch.ones(1, 2, 2, 2)
    expected = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    assert torch.equal(place_features([finer, fine]), torch.cat([expected.view(1, 1, 2, 2), fine], dim=1))
