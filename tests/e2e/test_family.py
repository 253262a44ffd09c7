"""Every detector of the registry goes down the same line: no verb asks which one it is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.bundle import open_bundle
from meliad_edge.data.images import read_image
from meliad_edge.data.preprocess import to_model_input
from meliad_edge.evaluate import evaluate
from meliad_edge.evaluation_report import evaluation_report
from meliad_edge.models import create_detector
from meliad_edge.models.network import detector_names
from meliad_edge.run import load_run
from meliad_edge.runtime.torch_engine import TorchEngine

pytestmark = pytest.mark.workshop

IMAGE_SIZE = 64
SHOTS = 4
# Training steps of the detectors that take them: enough to change the weights, too few to be good.
STEPS = 4


def _is_ours(name: str) -> bool:
    """Not one that another test module registered, such as anomalib's."""
    return type(create_detector(name)).__module__.startswith("meliad_edge.models.")


@dataclass(frozen=True)
class Fitted:
    """What `fit` printed, and the run folder it left."""

    detector: str
    run: Path
    printed: dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """What `export` printed, and the bundle it wrote."""

    bundle: Path
    printed: dict[str, Any]


@pytest.fixture(scope="module", params=[name for name in detector_names() if _is_ours(name)])
def fitted(
    request: pytest.FixtureRequest, invoke: Any, texture_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> Fitted:
    """A run of each detector. Read only."""
    name = request.param
    run = tmp_path_factory.mktemp(name) / "run"
    takes_steps = "steps" in {field.name for field in fields(create_detector(name))}
    outcome = invoke(
        *("fit", texture_set, "--detector", name, "--shots", SHOTS, "--image-size", IMAGE_SIZE, "--out", run, "--json"),
        *(("--option", f"steps={STEPS}") if takes_steps else ()),
    )
    assert outcome.code == 0, outcome.err
    return Fitted(name, run, outcome.json)


@pytest.fixture(scope="module")
def exported(fitted: Fitted, invoke: Any) -> Exported:
    """The bundle of that run. Read only."""
    bundle = fitted.run.with_name("model.meliad")
    outcome = invoke("export", fitted.run, "--out", bundle, "--json")
    assert outcome.code == 0, outcome.err
    return Exported(bundle, outcome.json)


@pytest.fixture(scope="module")
def prediction(exported: Exported, invoke: Any, texture_set: Path) -> dict[str, Any]:
    """What `predict` prints of one defective picture."""
    outcome = invoke("predict", exported.bundle, texture_set / "test" / "stain" / "000.png", "--json", "--threads", 1)
    assert outcome.code == 0, outcome.err
    (only,) = outcome.json["predictions"]
    return dict(only)


def test_fit_leaves_a_calibrated_run(fitted: Fitted) -> None:
    run = load_run(fitted.run)
    assert fitted.printed["run"] == str(fitted.run)
    assert fitted.printed["threshold"] == run.calibration.threshold
    assert fitted.printed["calibration_images"] == 6
    assert run.config.detector == fitted.detector
    assert run.network.input_hw == (IMAGE_SIZE, IMAGE_SIZE)


def test_evaluate_measures_images_and_pixels(invoke: Any, fitted: Fitted) -> None:
    outcome = invoke("evaluate", fitted.run, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert (result["test_normals"], result["test_anomalies"], result["test_masks"]) == (8, 16 - SHOTS, 16 - SHOTS)
    assert result["pixel_absent_because"] is None
    for name in ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro_30", "aupro_05"):
        assert 0.0 <= result[name] <= 1.0


def test_the_report_says_what_became_of_the_backbone(fitted: Fitted) -> None:
    run = load_run(fitted.run)
    said = dict(evaluation_report(run, evaluate(run)).provenance)["backbone"]
    expected = {"devnet": "fine-tuned", "flos": "fine-tuned", "ssae": "none"}.get(fitted.detector, "frozen")
    assert expected in said


def test_the_bundle_decides_as_the_run(invoke: Any, fitted: Fitted, exported: Exported) -> None:
    parity = exported.printed["parity"]
    assert parity
    assert all(engine["passed"] and engine["label_flips"] == [] for engine in parity)
    assert all(engine["frames"] == 6 + SHOTS for engine in parity)
    outcome = invoke("check", exported.bundle, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["passed"] is True
    assert [engine["frames"] for engine in outcome.json["engines"]] == [8]
    assert open_bundle(exported.bundle).manifest.detector == fitted.detector


def test_predict_says_what_the_trained_network_says(
    fitted: Fitted, prediction: dict[str, Any], texture_set: Path
) -> None:
    run = load_run(fitted.run)
    picture = read_image(texture_set / "test" / "stain" / "000.png")
    expected = TorchEngine(run.network).infer(to_model_input(picture, run.network.input_hw)[np.newaxis])
    rounding = 0.01 * run.calibration.spread
    assert prediction["score"] == pytest.approx(float(expected.score[0]), abs=rounding)
    np.testing.assert_allclose(prediction["map"], expected.map[0], rtol=0.0, atol=rounding)
    assert prediction["threshold"] == run.calibration.threshold
    assert prediction["decision"] == ("anomaly" if prediction["score"] >= prediction["threshold"] else "normal")
    assert bool(prediction["regions"]) == (prediction["decision"] == "anomaly")


def test_the_score_is_the_mean_of_the_top_cells(fitted: Fitted, exported: Exported, prediction: dict[str, Any]) -> None:
    bundle = open_bundle(exported.bundle)
    top_cells = bundle.manifest.top_cells
    assert top_cells == load_run(fitted.run).network.top_cells
    if top_cells is None:
        pytest.skip(f"{fitted.detector} computes its score as its paper does, not from the top cells of the map")
    cells = np.sort(np.array(prediction["map"]).ravel())[::-1]
    assert 1 <= top_cells < len(cells)
    explained = cells[:top_cells].mean() + bundle.calibration.score_offset
    # The cells are printed to five places; their mean is as exact.
    assert prediction["score"] == pytest.approx(explained, rel=1e-5, abs=1e-5)
