from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meliad_edge.models.trained_direction import PRIOR, image_loss, train_direction

TOP = 3
Bag = tuple[NDArray[np.float32], NDArray[np.float32]]


def bags(rng: np.random.Generator, count: int, planted: NDArray[np.float32] | None = None) -> Bag:
    """Noise of 64 cells of depth 24 and evidence that says nothing; where planted, twelve cells of each are moved."""
    cells = rng.normal(0.0, 1.0, (count, 64, 24)).astype(np.float32)
    if planted is not None:
        for image in cells:
            image[rng.permutation(64)[:12]] += planted
    return cells, rng.normal(0.0, 1.0, (count, 64)).astype(np.float32)


def reference_loss(direction: NDArray[np.float64], bias: float, normal: Bag, shots: Bag) -> float:
    """The loss in plain float64, image by image."""
    loss = 0.0
    for (cells, evidence), sign in ((normal, 1.0), (shots, -1.0)):
        for image, own in zip(cells.astype(np.float64), evidence.astype(np.float64), strict=True):
            score = np.sort(own + image @ direction)[-TOP:].mean() + bias
            loss += 0.5 * math.log1p(math.exp(sign * score)) / len(cells)
    return loss


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_cross_entropy_of_the_mean_of_top_cells(seed: int) -> None:
    rng = np.random.default_rng(seed)
    normal, shots = bags(rng, 7), bags(rng, 3)
    direction = rng.normal(0.0, 0.1, 24)

    def scores(bag: Bag) -> torch.Tensor:
        evidence = torch.from_numpy(bag[1] + (bag[0] @ direction).astype(np.float32))
        return evidence.topk(TOP, dim=1).values.mean(dim=1) + 0.3

    assert float(image_loss(scores(normal), scores(shots))) == pytest.approx(
        reference_loss(direction, 0.3, normal, shots), rel=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_what_is_planted_in_some_cells_of_the_shots_is_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    planted = rng.normal(0.0, 1.0, 24).astype(np.float32)
    normal, shots = bags(rng, 60), bags(rng, 10, planted)
    direction = train_direction(normal, shots, top_cells=TOP, steps=100)
    cosine = direction @ planted / (np.linalg.norm(direction) * np.linalg.norm(planted))
    assert cosine > 0.6  # of a random direction: 0.2
    # Better than where it began, prior included.
    prior = PRIOR / 10 * float(np.square(direction).sum())
    with_bias = min(
        reference_loss(direction.astype(np.float64), bias, normal, shots) for bias in np.linspace(-4, 4, 81)
    )
    without = min(reference_loss(np.zeros(24), bias, normal, shots) for bias in np.linspace(-4, 4, 81))
    assert with_bias + prior < without - 0.01


def test_fewer_images_move_it_less() -> None:
    rng = np.random.default_rng(0)
    normal, shots = bags(rng, 60), bags(rng, 10, rng.normal(0.0, 1.0, 24).astype(np.float32))
    lengths = [
        np.linalg.norm(train_direction(normal, (shots[0][:count], shots[1][:count]), top_cells=TOP, steps=100))
        for count in (1, 3, 10)
    ]
    assert lengths[0] < lengths[1] < lengths[2]
    few_normals = train_direction((normal[0][:2], normal[1][:2]), shots, top_cells=TOP, steps=100)
    assert np.linalg.norm(few_normals) < lengths[2]


def test_shots_that_are_told_already_leave_it_short() -> None:
    rng = np.random.default_rng(0)
    planted = rng.normal(0.0, 1.0, 24).astype(np.float32)
    normal, (cells, evidence) = bags(rng, 60), bags(rng, 10, planted)
    told = train_direction(normal, (cells, evidence + 12.0), top_cells=TOP, steps=100)
    untold = train_direction(normal, (cells, evidence), top_cells=TOP, steps=100)
    assert np.linalg.norm(told) < 0.5 * np.linalg.norm(untold)


def test_without_steps_there_is_none() -> None:
    rng = np.random.default_rng(0)
    assert not train_direction(bags(rng, 4), bags(rng, 2), top_cells=TOP, steps=0).any()
