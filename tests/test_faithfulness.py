from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from meliad_edge.faithfulness import (
    Randomisation,
    ScoreCurves,
    nearest_images,
    randomisation_check,
    randomise_weights,
    rank_correlation,
    score_curves,
)
from meliad_edge.models.network import DetectorNetwork, no_prototypes
from meliad_edge.run import load_run
from meliad_edge.runtime.torch_engine import TorchEngine

pytestmark = pytest.mark.workshop

SIDE, GRID = 32, 8


class Brightness(DetectorNetwork):
    """The map is the mean brightness of each cell, in [0, 1], and the score is its mean: every cell counts alike."""

    def __init__(self) -> None:
        super().__init__((SIDE, SIDE))
        self.channels = nn.Parameter(torch.tensor([0.7, 0.2, 0.1]))

    @property
    def grid_hw(self) -> tuple[int, int]:
        return GRID, GRID

    @property
    def top_cells(self) -> int:
        return GRID * GRID

    def describe(self) -> dict[str, Any]:
        return {}

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        brightness = (frames.float() * self.channels).sum(-1) / 255.0
        cell = SIDE // GRID
        evidence = brightness.view(-1, GRID, cell, GRID, cell).mean((2, 4))
        return evidence.mean((1, 2)), evidence, no_prototypes(evidence)


def bright_cells(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A black image with some bright cells, and its map."""
    cells = np.zeros(GRID * GRID)
    cells[rng.permutation(GRID * GRID)[:count]] = rng.uniform(0.4, 1.0, count)
    cells = cells.reshape(GRID, GRID)
    pixels = np.kron(np.rint(255 * cells), np.ones((SIDE // GRID, SIDE // GRID)))
    frame = np.repeat(pixels[..., np.newaxis], 3, axis=2).astype(np.uint8)
    return frame, cells.astype(np.float32)


def laid_over(top: np.ndarray, below: np.ndarray, cells: set[int]) -> np.ndarray:
    """Slow: each pixel mixed by how much of it the four nearest cells give it."""
    result = np.zeros_like(top)
    for y in range(SIDE):
        for x in range(SIDE):
            row, column, weight = (y + 0.5) * GRID / SIDE - 0.5, (x + 0.5) * GRID / SIDE - 0.5, 0.0
            for i in (int(np.floor(row)), int(np.floor(row)) + 1):
                for j in (int(np.floor(column)), int(np.floor(column)) + 1):
                    cell = min(max(i, 0), GRID - 1) * GRID + min(max(j, 0), GRID - 1)
                    weight += (cell in cells) * (1 - abs(row - i)) * (1 - abs(column - j))
            result[y, x] = np.rint(weight * top[y, x] + (1 - weight) * below[y, x])
    return result


def test_curves_of_a_network_with_a_known_response() -> None:
    rng = np.random.default_rng(0)
    frame, evidence = bright_cells(rng, 6)
    fill = np.full_like(frame, 10)
    network = Brightness()
    score = float(TorchEngine(network).infer(frame[np.newaxis]).score[0])
    typical = 10 / 255
    curves = score_curves(
        TorchEngine(network),
        frame[np.newaxis],
        fill[np.newaxis],
        evidence[np.newaxis],
        np.array([score], np.float32),
        typical_score=typical,
        seed=0,
    )
    order = np.argsort(-evidence.ravel(), kind="stable").tolist()
    expected_deletion, expected_insertion = [], []
    counts = [0, 1, 2, 4, 8, 16, 32, 64]
    for count in counts:
        for curve, top, below in ((expected_deletion, fill, frame), (expected_insertion, frame, fill)):
            value = float(np.mean(laid_over(top, below, set(order[:count])) / 255.0))
            curve.append(min(max((value - typical) / (score - typical), 0.0), 1.0))
    assert curves.shares == tuple(count / 64 for count in counts)
    assert curves.deletion == pytest.approx(expected_deletion, abs=1e-3)
    assert curves.insertion == pytest.approx(expected_insertion, abs=1e-3)
    assert curves.images == 1


def test_a_good_order_beats_a_random_one_and_a_bad_order_loses() -> None:
    rng = np.random.default_rng(1)
    frames, maps = (np.stack(part) for part in zip(*(bright_cells(rng, 5) for _ in range(6)), strict=True))
    engine = TorchEngine(Brightness())
    scores = engine.infer(frames).score

    def areas(order: np.ndarray) -> tuple[float, ...]:
        c = score_curves(engine, frames, np.zeros_like(frames), order, scores, typical_score=0.0, seed=2)
        assert c.deletion[0] == c.insertion[-1] == c.deletion_random[0] == c.insertion_random[-1] == 1.0
        assert c.deletion[-1] == c.insertion[0] == c.deletion_random[-1] == c.insertion_random[0] == 0.0
        return tuple(map(c.area, (c.deletion, c.deletion_random, c.insertion, c.insertion_random)))

    deletion, deletion_random, insertion, insertion_random = areas(maps)
    assert deletion < 0.25 < 0.4 < deletion_random < 0.6
    assert insertion > 0.75 > 0.6 > insertion_random > 0.4
    worst_deletion, again, worst_insertion, _ = areas(-maps)
    assert worst_deletion > again == deletion_random
    assert worst_insertion < insertion_random


def test_a_grid_of_one_cell_has_two_points() -> None:
    frame, _ = bright_cells(np.random.default_rng(2), 5)
    engine = TorchEngine(Brightness())
    score = engine.infer(frame[np.newaxis]).score
    one = np.ones((1, 1, 1), np.float32)
    curves = score_curves(engine, frame[None], np.zeros_like(frame)[None], one, score, typical_score=0.0, seed=0)
    assert (curves.shares, curves.deletion, curves.insertion) == ((0.0, 1.0), (1.0, 0.0), (0.0, 1.0))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.data())
def test_the_area_is_that_of_the_trapezoids(heights: list[float], data: st.DataObject) -> None:
    inner = data.draw(st.lists(st.floats(0, 1), min_size=len(heights) - 2, max_size=len(heights) - 2))
    shares = (0.0, *sorted(inner), 1.0)
    slow = 0.0
    for index in range(len(heights) - 1):
        slow += (shares[index + 1] - shares[index]) * 0.5 * (heights[index] + heights[index + 1])
    curves = ScoreCurves(shares, (), (), (), (), 1)
    assert curves.area(heights) == pytest.approx(slow, abs=1e-12)


def test_the_nearest_image_is_found() -> None:
    rng = np.random.default_rng(3)
    others = np.array([np.full((64, 48, 3), rng.integers(0, 256, 3)) for _ in range(7)], np.uint8)
    order = [4, 0, 6]
    noisy = np.clip(others[order].astype(int) + rng.integers(-3, 4, (3, 64, 48, 3)), 0, 255).astype(np.uint8)
    assert (nearest_images(noisy, others) == others[order]).all()


def slow_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([np.sum(values < value) + (np.sum(values == value) + 1) / 2 for value in values])


@pytest.mark.parametrize("levels", [3, 1000])
def test_rank_correlation_is_that_of_the_slow_definition(levels: int) -> None:
    rng = np.random.default_rng(levels)
    first, second = (rng.integers(0, levels, (6, 7)).astype(np.float32) for _ in range(2))
    second += 0.5 * first
    slow = np.corrcoef(slow_ranks(first.ravel()), slow_ranks(second.ravel()))[0, 1]
    assert rank_correlation(first, second) == pytest.approx(slow, abs=1e-12)
    assert rank_correlation(first, np.exp(first / levels)) == pytest.approx(1.0)
    assert rank_correlation(first, -first) == pytest.approx(-1.0)


def test_a_map_without_ranks_has_no_correlation() -> None:
    values = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)
    broken = values.copy()
    broken[1, 1] = np.nan
    assert rank_correlation(values, broken) is None
    assert rank_correlation(values, np.ones_like(values)) is None


def test_random_weights_change_the_maps_and_not_the_network(small_run: Path) -> None:
    network = load_run(small_run).network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    frames = np.random.default_rng(6).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    maps = TorchEngine(network).infer(frames).map
    randomised = randomise_weights(network, frames, seed=0)
    after = randomised.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in network.named_parameters():
        if name.startswith("backbone."):
            # The same values, elsewhere.
            assert torch.equal(after[name].flatten().sort().values, parameter.flatten().sort().values), name
            if len(parameter.unique()) > 3:
                assert not torch.equal(after[name], parameter), name
    kept = [name for name in before if not name.startswith("backbone.")]
    assert kept and all(torch.equal(after[name], before[name]) for name in kept)
    moved = TorchEngine(randomised).infer(frames).map
    assert np.isfinite(moved).all()
    assert not np.allclose(moved, maps)
    assert not any(module.training for module in randomised.modules())
    again = randomise_weights(network, frames, seed=0).state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)
    other = randomise_weights(network, frames, seed=1).state_dict()
    assert any(not torch.equal(after[name], other[name]) for name in after)


def test_normalisation_gets_the_statistics_of_the_random_network(small_run: Path) -> None:
    network = load_run(small_run).network
    frames = np.random.default_rng(7).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    randomised = randomise_weights(network, frames, seed=0)
    inputs: dict[nn.Module, Tensor] = {}
    layers = [module for module in randomised.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_hook(lambda module, args, _: inputs.__setitem__(module, args[0]))
    with torch.no_grad():
        randomised(torch.from_numpy(frames))
    assert len(layers) > 10
    for layer in layers:
        error = (layer.running_mean - inputs[layer].mean((0, 2, 3))).abs().mean()
        assert error < 0.1 * inputs[layer].std()


def test_a_network_without_backbone_loses_all_its_weights() -> None:
    network = Brightness()
    frames = np.random.default_rng(8).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    after = [randomise_weights(network, frames, seed=seed).state_dict()["channels"] for seed in range(6)]
    assert any(not torch.equal(value, network.channels) for value in after)
    assert all(torch.equal(value.sort().values, network.channels.detach().sort().values) for value in after)


def test_the_check_fails_for_maps_that_ignore_the_weights_and_counts_unusable_ones() -> None:
    # Grey images: the channels, which change places, do not matter.
    rng = np.random.default_rng(9)
    frames, maps = (np.stack(part) for part in zip(*(bright_cells(rng, 40) for _ in range(4)), strict=True))
    ignored = randomisation_check(Brightness(), frames, maps, seed=0)
    assert ignored.correlation == pytest.approx(1.0, abs=1e-3)
    assert (ignored.passed, ignored.images, ignored.unusable_maps) == (False, 4, 0)
    maps[0, 0, 0] = np.nan
    maps[1] = 0.5
    partly = randomisation_check(Brightness(), frames, maps, seed=0)
    assert partly.correlation == pytest.approx(0.5, abs=1e-3)
    assert partly.unusable_maps == 2
    assert not Randomisation(-0.9, 4, 0).passed
    assert Randomisation(0.49, 4, 0).passed
