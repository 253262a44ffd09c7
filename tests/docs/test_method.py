from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PAGE = "docs/method.md"

TableRows = Callable[[str, str], list[list[str]]]

pytestmark = pytest.mark.workshop


def load_reference(repository: Path) -> ModuleType:
    """The definition of the operator; it lies outside the package."""
    spec = importlib.util.spec_from_file_location("reference", repository / "kernels/reference/patch_entropy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constants_are_those_of_the_code(table_rows: TableRows) -> None:
    rows = table_rows(PAGE, "| constant |")
    for name, file, value, _ in rows:
        module = importlib.import_module("meliad_edge." + file.removesuffix(".py").replace("/", "."))
        assert getattr(module, name) == ast.literal_eval(value), name
    # A constant of the detector that the page does not mention is a page that lies by omission.
    for part in ("meliad", "meliad_network", "label_terms", "trained_direction", "places", "whitening"):
        module = importlib.import_module(f"meliad_edge.models.{part}")
        public = {name for name in vars(module) if name.isupper() and not name.startswith("_")}
        assert public <= {row[0] for row in rows}


def test_example_values_are_those_of_the_reference(table_rows: TableRows, repository: Path) -> None:
    """One cell, one prototype per class and a direction that alone gives the log odds."""
    from meliad_edge.models.meliad import KAPPA

    definition = load_reference(repository).patch_entropy_score

    def evidence(log_odds: float, kappa: float) -> float:
        z = np.array([log_odds], np.float64).reshape(1, 1, 1, 1)
        result = definition(
            z,
            np.zeros((2, 1)),
            np.ones(1),
            n_normal=1,
            top_cells=1,
            softness=0.01,
            normal_scale=1.0,
            anomaly_scale=1.0,
            bias=0.0,
            kappa=kappa,
            offset=0.0,
        )
        return float(result.map[0, 0, 0])

    for row in table_rows(PAGE, "| log odds"):
        x, probability, entropy, damped = (float(cell) for cell in row)
        assert probability == pytest.approx(1.0 / (1.0 + np.exp(-x)), abs=6e-5)
        assert damped == pytest.approx(evidence(x, KAPPA), abs=6e-5)
        if x != 0.0:
            assert entropy == pytest.approx((1.0 - evidence(x, 1.0 - 1e-12) / x), abs=6e-5)


def test_example_values_are_those_of_the_network(table_rows: TableRows) -> None:
    import torch

    from meliad_edge.models.meliad import KAPPA
    from meliad_edge.models.scoring import entropy_evidence

    rows = np.array([[float(cell) for cell in row] for row in table_rows(PAGE, "| log odds")])
    log_odds, _, entropy, damped = torch.from_numpy(rows).T
    assert entropy_evidence(log_odds, KAPPA).numpy() == pytest.approx(damped.numpy(), abs=6e-5)
    assert ((1.0 - KAPPA * entropy) * log_odds).numpy() == pytest.approx(damped.numpy(), abs=3e-4)


def test_stated_numbers_of_images_suffice_and_are_the_least(pages: dict[str, str]) -> None:
    from meliad_edge.calibrate import calibrate

    stated = re.findall(r"(\d+) in 100 needs (\d+)(?: calibration images)?, so (\d+)", pages[PAGE])
    assert [(rate, held_out) for rate, held_out, _ in stated] == [("1", "99"), ("5", "19")]
    for rate, held_out, normals in stated:
        target, count = int(rate) / 100, int(held_out)
        assert round(0.25 * int(normals)) == count
        enough = calibrate(np.arange(float(count)), target_false_alarm_rate=target)
        assert enough.guaranteed_false_alarm_rate <= target + 1e-12
        fewer = calibrate(np.arange(float(count - 1)), target_false_alarm_rate=target)
        assert fewer.guaranteed_false_alarm_rate > target


def test_threshold_is_the_stated_formula() -> None:
    from meliad_edge.calibrate import HEADROOM, SMALLEST_SPREAD, calibrate

    scores = np.sort(np.random.default_rng(3).normal(size=40)).astype(np.float32).astype(np.float64)
    for rate in (0.01, 0.05, 0.2, 0.5):
        rank = min(int(np.ceil(41 * (1 - rate) - 1e-9)), 40)
        median = float(np.median(scores))
        room = HEADROOM * max(scores[rank - 1] - median, SMALLEST_SPREAD * max(1.0, abs(median)))
        if rank < 40:
            room = min(room, (scores[rank] - scores[rank - 1]) / 2)
        calibration = calibrate(scores, target_false_alarm_rate=rate)
        assert calibration.threshold == pytest.approx(scores[rank - 1] + room, abs=1e-6)
        assert calibration.guaranteed_false_alarm_rate == pytest.approx((41 - rank) / 41)
