"""The NumPy definition itself, against values worked out by hand and properties of the equation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def test_worked_example(make_case: Any, reference: Any) -> None:
    # One cell at the origin, prototypes at distance 3 (normal) and 1 and 1 (anomalous), one channel.
    case = make_case(images=1, depth=1, height=1, width=1, prototypes=3, n_normal=1, top_cells=1)
    case = case.but(
        z=np.zeros((1, 1, 1, 1), np.float32),
        prototypes=np.array([[3], [1], [-1]], np.float32),
        softness=0.5,
        normal_scale=2.0,
        anomaly_scale=1.0,
        bias=-5.0,
        kappa=0.5,
        offset=0.25,
    )
    soft_minimum_anomaly = 1 - 0.5 * np.log(2)
    x = (-soft_minimum_anomaly - 5.0) - (-2.0 * 3.0)
    p = 1 / (1 + np.exp(-x))
    entropy_bits = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    outputs = reference(case)
    assert outputs.map.item() == pytest.approx((1 - 0.5 * entropy_bits) * x)
    assert outputs.score.item() == pytest.approx((1 - 0.5 * entropy_bits) * x + 0.25)
    assert outputs.nearest.ravel().tolist() == [0, 1]


def test_entropy_takes_nothing_away_when_kappa_is_zero_and_never_changes_the_sign(
    make_case: Any, reference: Any
) -> None:
    case = make_case()
    plain, doubting = reference(case.but(kappa=0.0)).map, reference(case.but(kappa=0.9)).map
    assert (np.sign(plain) == np.sign(doubting)).all()
    assert (np.abs(doubting) < np.abs(plain)).all()


def test_towards_zero_softness_only_the_nearest_prototype_counts(make_case: Any, reference: Any) -> None:
    case = make_case(softness=1e-3, kappa=0.0)
    z = np.moveaxis(case.z.astype(np.float64), 1, -1)[..., None, :]
    d = np.linalg.norm(z - case.prototypes, axis=-1)
    n_normal, parameters = case.parameters.n_normal, case.parameters
    expected = (
        parameters.normal_scale * d[..., :n_normal].min(-1)
        - parameters.anomaly_scale * d[..., n_normal:].min(-1)
        + z[..., 0, :] @ case.direction
        + parameters.bias
    )
    # Two prototypes within the softness of each other still blend a little.
    np.testing.assert_allclose(reference(case).map, expected, atol=2e-3)


def test_order_of_the_prototypes_of_a_class_does_not_matter(make_case: Any, reference: Any) -> None:
    case = make_case()
    n_normal = case.parameters.n_normal
    shuffled = np.concatenate([case.prototypes[:n_normal][::-1], case.prototypes[n_normal:][::-1]])
    np.testing.assert_allclose(reference(case.but(prototypes=shuffled)).map, reference(case).map)
