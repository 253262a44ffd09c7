from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.models.label_terms import Normality, ShotPatches, fit_label_terms, left_out_evidence, spread_ratio

DEPTH, WHITENED = 12, 9
WEIGHTS: dict[str, Any] = {"anomaly_weight": 0.5, "direction_weight": 0.25, "seed": 0}


def distance(patches: NDArray[Any], prototypes: NDArray[Any]) -> NDArray[np.float64]:
    """To the nearest prototype, plainly."""
    return np.linalg.norm(patches[..., None, :].astype(np.float64) - prototypes, axis=-1).min(-1)


@pytest.fixture
def normality() -> Normality:
    rng = np.random.default_rng(1)
    prototypes = rng.normal(size=(20, DEPTH)).astype(np.float32)
    reference = rng.normal(size=(6, 4, 4, DEPTH)).astype(np.float32)
    return Normality(prototypes, reference, distance(reference, prototypes).astype(np.float32), WHITENED)


def shots(count: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(2).normal(size=(count, 4, 4, DEPTH)).astype(np.float32)
    drawn[:, 1:3, 1:3] += 3.0
    return drawn


@pytest.mark.parametrize("count", [1, 4])
def test_evidence_is_a_direction_less_a_distance(normality: Normality, count: int) -> None:
    given = shots(count)
    terms = fit_label_terms(ShotPatches.of(given, normality.prototypes), normality, **WEIGHTS)
    # Two of 16 patches of each shot, the most deviating ones: too few for k-means to merge any.
    expected = []
    for image in given.reshape(count, 16, DEPTH):
        expected.extend(image[np.argsort(-distance(image, normality.prototypes))[:2]])
    assert np.array_equal(np.sort(terms.prototypes, axis=0), np.sort(np.array(expected), axis=0))
    direction = given.mean((0, 1, 2), dtype=np.float64) - normality.reference.mean((0, 1, 2), dtype=np.float64)
    direction[WHITENED:] = 0.0
    direction *= normality.distances.std() / (normality.reference @ direction).std()
    direction *= 0.25 * (count - 1) / (count + 2)
    assert terms.direction == pytest.approx(direction, abs=1e-5)
    cells = np.random.default_rng(3).normal(size=(5, DEPTH)).astype(np.float32)
    of_cells = cells @ direction - 0.5 * count / (count + 2) * distance(cells, terms.prototypes)
    assert terms(cells) == pytest.approx(of_cells, abs=1e-4)


def test_no_shots_add_nothing(normality: Normality) -> None:
    terms = fit_label_terms(ShotPatches.of(shots(0), normality.prototypes), normality, **WEIGHTS)
    assert terms.prototypes.shape == (1, DEPTH)
    assert not terms(normality.reference).any()


@pytest.mark.parametrize("count", [2, 5, 23])
def test_no_shot_is_judged_by_its_own_patches(normality: Normality, count: int) -> None:
    given = shots(count)
    patches = ShotPatches.of(given, normality.prototypes)
    left_out = left_out_evidence(given, patches, normality, **WEIGHTS)
    for index in range(count):
        others = given[[other for other in range(count) if other % 10 != index % 10]]
        terms = fit_label_terms(ShotPatches.of(others, normality.prototypes), normality, **WEIGHTS)
        expected = terms(given[index : index + 1])[0] - terms(normality.reference).mean()
        assert left_out[index] == pytest.approx(expected, abs=1e-5)
    terms = fit_label_terms(patches, normality, **WEIGHTS)
    assert left_out.max() < (terms(given) - terms(normality.reference).mean()).max()


def test_of_one_shot_others_say_nothing(normality: Normality) -> None:
    given = shots(1)
    assert not left_out_evidence(given, ShotPatches.of(given, normality.prototypes), normality, **WEIGHTS).any()


def test_a_term_without_a_spread_has_no_ratio() -> None:
    spread = np.array([1.0, 2.0, 4.0], np.float32)
    assert spread_ratio(spread, 4.0 * spread) == pytest.approx(0.25)
    assert spread_ratio(spread, np.ones(3, np.float32)) == 0.0
