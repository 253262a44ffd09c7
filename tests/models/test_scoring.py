from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meliad_edge.models.scoring import ScoringParameters, entropy_evidence, patch_entropy_score

REFERENCE = Path(__file__).parents[2] / "kernels" / "reference" / "patch_entropy.py"


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("patch_entropy_reference", REFERENCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.patch_entropy_score


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    images, depth, height, width = (draw(st.integers(1, limit)) for limit in (3, 24, 6, 6))
    normal, anomalous = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    parameters = ScoringParameters(
        n_normal=normal,
        top_cells=draw(st.integers(1, height * width)),
        softness=draw(st.floats(0.01, 2.0)),
        normal_scale=draw(st.floats(0.1, 3.0)),
        anomaly_scale=draw(st.floats(0.0, 3.0)),
        bias=draw(st.floats(-3.0, 3.0)),
        kappa=draw(st.floats(0.0, 0.9)),
        offset=draw(st.floats(-2.0, 2.0)),
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = random.normal(size=(images, depth, height, width)).astype(np.float32)
    prototypes = random.normal(size=(normal + anomalous, depth)).astype(np.float32)
    return z, prototypes, (random.normal(size=depth) / depth**0.5).astype(np.float32), parameters


@settings(deadline=None)
@given(case=cases())
def test_the_network_computes_the_definition(reference: Any, case: tuple[Any, ...]) -> None:
    z, prototypes, direction, parameters = case
    score, evidence, nearest = patch_entropy_score(*map(torch.from_numpy, (z, prototypes, direction)), parameters)
    expected = reference(z, prototypes, direction, **asdict(parameters))
    scale = 1.0 + float(np.abs(expected.map).max())
    np.testing.assert_allclose(evidence.numpy(), expected.map, atol=1e-4 * scale)
    np.testing.assert_allclose(score.numpy(), expected.score, atol=1e-4 * scale)
    np.testing.assert_array_equal(nearest.numpy(), expected.nearest)


@settings(deadline=None)
@given(case=cases())
def test_the_score_is_the_mean_of_the_top_cells_of_the_map(case: tuple[Any, ...]) -> None:
    *arrays, parameters = case
    score, evidence, _ = patch_entropy_score(*map(torch.from_numpy, arrays), parameters)
    top = np.sort(evidence.flatten(1).numpy(), axis=1)[:, -parameters.top_cells :].mean(axis=1)
    np.testing.assert_allclose(score.numpy() - parameters.offset, top, atol=1e-4)


@given(st.floats(0.0, 0.9), st.lists(st.integers(-60_000, 60_000), min_size=2, max_size=40, unique=True))
def test_evidence_grows_with_the_log_odds(kappa: float, thousandths: list[int]) -> None:
    x = torch.tensor(sorted(thousandths), dtype=torch.float64) / 1000.0
    evidence = entropy_evidence(x, kappa)
    assert (evidence.diff() >= 0.0).all()
    assert torch.equal(evidence.sign(), x.sign())
    assert (evidence.abs() <= x.abs()).all()


def test_evidence_of_the_undecided_and_of_the_sure() -> None:
    x = torch.tensor([0.0, 50.0, -50.0], dtype=torch.float64)
    assert entropy_evidence(x, 0.9).tolist() == pytest.approx([0.0, 50.0, -50.0])
    half = torch.tensor(1e-6, dtype=torch.float64)
    assert float(entropy_evidence(half, 0.5) / half) == pytest.approx(0.5, abs=1e-5)


def test_it_can_be_trained_through() -> None:
    random = torch.Generator().manual_seed(0)
    z = torch.randn(2, 8, 4, 4, generator=random, requires_grad=True)
    prototypes = torch.randn(6, 8, generator=random, requires_grad=True)
    direction = torch.randn(8, generator=random, requires_grad=True)
    parameters = ScoringParameters(4, 3, 0.5, 1.0, 1.0, 0.0, 0.5, 0.0)
    patch_entropy_score(z, prototypes, direction, parameters)[0].sum().backward()
    for tensor in (z, prototypes, direction):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().sum() > 0
