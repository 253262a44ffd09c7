"""Screening, in bfloat16 or in bytes: nothing that matters is left out, and it is chosen where it pays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="session", params=["vnni", "amx"])
def screened(request: pytest.FixtureRequest, sanitized: Any, make_case: Any) -> Any:
    """Outputs of an instruction set that screens; fails where another one was chosen, unless that is allowed.

    Bytes are coarse: where very many distances are alike, vectors are faster.
    """
    instruction_set: str = request.param
    if sanitized.run(make_case(), instruction_set).returncode == 3:
        pytest.skip(f"this processor has no {instruction_set}, or the system does not lend it")

    def run(case: Any, may_fall_back: bool = False) -> Any:
        chosen = sanitized.run(case, instruction_set).stderr.decode()
        assert chosen == instruction_set or (may_fall_back and chosen == "avx512")
        return sanitized(case, instruction_set)

    run.instruction_set = instruction_set  # type: ignore[attr-defined]
    return run


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_agrees_with_the_definition_where_prototypes_crowd(
    data: st.DataObject, make_case: Any, screened: Any, precision: Any
) -> None:
    """Prototypes in clusters and cells near them: many distances that differ by less than bfloat16 can tell."""
    prototypes = data.draw(st.sampled_from([70, 300, 640]), "prototypes")
    case = make_case(
        data.draw(st.integers(0, 2**32 - 1), "seed"),
        images=1,
        depth=data.draw(st.sampled_from([16, 33, 100, 432]), "depth"),
        height=data.draw(st.integers(1, 12), "height"),
        prototypes=prototypes,
        n_normal=prototypes * 4 // 5,
        softness=data.draw(st.sampled_from([1e-4, 1e-3, 1e-2]), "softness"),
        top_cells=1,
    )
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "clusters"))
    spread = data.draw(st.sampled_from([1e-3, 1e-2, 0.1]), "spread")
    centres = random.normal(size=(prototypes // 3, case.prototypes.shape[1]))
    crowded = centres[np.arange(prototypes) % len(centres)] + spread * case.prototypes
    cells = centres[random.integers(0, len(centres), case.z[0, 0].size)] + spread * random.normal(
        size=(case.z[0, 0].size, centres.shape[1])
    )
    case = case.but(prototypes=crowded.astype(np.float32), z=cells.T.reshape(case.z.shape).astype(np.float32))
    precision.check(screened(case, may_fall_back=True), case)


def test_more_candidates_than_are_kept(make_case: Any, screened: Any, precision: Any) -> None:
    case = make_case(images=1, depth=40, prototypes=3000, n_normal=2800, softness=1e-3, height=2, width=20)
    prototypes = case.prototypes.copy()
    prototypes[1000:1150] = prototypes[1000] + 1e-5 * prototypes[1000:1150]
    z = case.z.copy()
    z[0, :, 0, :5] = prototypes[1000, :, None]
    case = case.but(prototypes=prototypes, z=z)
    precision.check(screened(case), case)


def test_lowest_index_wins_a_tie(make_case: Any, screened: Any) -> None:
    case = make_case(depth=64, prototypes=600, n_normal=400, softness=1e-3)
    repeated = np.concatenate([np.tile(case.prototypes[:200], (2, 1)), np.tile(case.prototypes[400:500], (2, 1))])
    nearest = screened(case.but(prototypes=repeated)).nearest
    assert (nearest[:, 0] < 200).all()
    assert ((nearest[:, 1] >= 400) & (nearest[:, 1] < 500)).all()


def test_a_cell_that_cannot_be_scored_changes_no_other(make_case: Any, screened: Any) -> None:
    case = make_case(depth=64, height=6, width=8, prototypes=300, n_normal=200, softness=1e-3)
    clean = screened(case)
    z = case.z.copy()
    z[1, 20, 2, 3], z[1, 21, 4, 1], z[1, 0, 0, 0] = np.nan, np.inf, 1e30
    outputs = screened(case.but(z=z))
    broken = np.isnan(outputs.map)
    assert np.argwhere(broken).tolist() == [[1, 0, 0], [1, 2, 3], [1, 4, 1]]
    np.testing.assert_array_equal(outputs.map[~broken], clean.map[~broken])
    assert outputs.score[0] == clean.score[0]
    assert np.isnan(outputs.score[1])


@pytest.mark.parametrize(
    "change",
    [{"softness": 2.0}, {"prototypes": "nan"}, {"prototypes": "huge"}],
    ids=["all prototypes matter", "not finite", "norms overflow"],
)
def test_vectors_are_chosen_where_screening_would_not_pay(
    change: dict[str, Any], make_case: Any, screened: Any, sanitized: Any
) -> None:
    case = make_case(depth=64, prototypes=300, n_normal=200, softness=change.get("softness", 1e-3))
    prototypes = case.prototypes.copy()
    if change.get("prototypes") == "nan":
        prototypes[7, 3] = np.nan
    if change.get("prototypes") == "huge":
        prototypes[7, 3] = 1e25
    assert sanitized.run(case.but(prototypes=prototypes), screened.instruction_set).stderr == b"avx512"


@pytest.mark.parametrize(("softness", "scale"), [(1e-3, 1.0), (1e-2, 10.0), (3e-6, 3e-3)])
def test_roundings_that_add_up_hide_nothing(
    softness: float, scale: float, make_case: Any, screened: Any, precision: Any
) -> None:
    """One half of the channels rounds down and the other up, so that the second nearest prototype looks nearer."""
    case = make_case(images=1, depth=432, height=4, width=4, prototypes=40, n_normal=30, softness=softness, top_cells=1)
    z = np.empty((432, 16), np.float32)
    z[:216], z[216:] = 1 + 2**-8, 1 + 3 * 2**-8
    prototypes = 3 * case.prototypes
    prototypes[3], prototypes[7] = 0, 0
    prototypes[3, 216:], prototypes[7, :216] = 451 / 512, z[0, 0]
    squared = np.square(z[:, 0].astype(np.float64) - prototypes[[3, 7]]).sum(axis=1)
    assert 0.1 < squared[0] - squared[1] < 0.4
    case = case.but(z=(scale * z).reshape(1, 432, 4, 4), prototypes=(scale * prototypes).astype(np.float32))
    precision.check(screened(case), case)


def test_roundings_of_bytes_that_add_up_hide_nothing(make_case: Any, screened: Any, precision: Any) -> None:
    """One large channel sets the scale; the others round up where they should not count, and down where they should."""
    case = make_case(images=1, depth=432, height=4, width=4, prototypes=40, n_normal=30, softness=1e-2, top_cells=1)
    z = np.full((432, 16), 3.5, np.float32)
    z[0], z[1] = 127, 0
    prototypes = 300 * case.prototypes
    prototypes[3], prototypes[7] = 3.53, 3.49  # as bytes 4 and 3
    prototypes[[3, 7], 0], prototypes[[3, 7], 1] = 0, 127
    squared = np.square(z[:, 0].astype(np.float64) - prototypes[[3, 7]]).sum(axis=1)
    assert 0.1 < squared[0] - squared[1] < 0.6
    case = case.but(z=z.reshape(1, 432, 4, 4), prototypes=prototypes.astype(np.float32))
    precision.check(screened(case), case)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), depth=st.sampled_from([32, 100, 432]))
def test_agrees_where_all_values_are_ties_of_bfloat16(
    seed: int, depth: int, make_case: Any, screened: Any, precision: Any
) -> None:
    random = np.random.default_rng(seed)
    case = make_case(seed, images=1, depth=depth, height=6, width=6, prototypes=96, n_normal=64, softness=1e-3)

    def ties(*shape: int) -> Any:
        sign = random.choice([-1.0, 1.0], size=shape)
        return (sign * (1 + (2 * random.integers(0, 128, shape) + 1) * 2.0**-8)).astype(np.float32)

    case = case.but(z=ties(1, depth, 6, 6), prototypes=ties(96, depth))
    precision.check(screened(case, may_fall_back=True), case)


LARGE = {
    "many patches": {"images": 1, "depth": 33, "height": 64, "width": 64, "top_cells": 205},
    "many prototypes": {"images": 1, "depth": 64, "height": 9, "width": 9, "prototypes": 2048, "n_normal": 1500},
    "many images": {"images": 32, "depth": 24},
}


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_large(shape: dict[str, int], make_case: Any, screened: Any, precision: Any) -> None:
    case = make_case(**shape, softness=1e-2)
    precision.check(screened(case), case)
