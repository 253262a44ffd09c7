from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meliad_edge.benchmarks.accuracy import Plan, run
from meliad_edge.benchmarks.job import Job
from meliad_edge.benchmarks.peer_detectors import LEFT_OUT, PEERS
from meliad_edge.errors import MissingExtraError
from meliad_edge.models.backbone import load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import TrainingImages, create_detector

pytestmark = pytest.mark.workshop

HAS_ANOMALIB = importlib.util.find_spec("anomalib") is not None
needs_anomalib = pytest.mark.skipif(not HAS_ANOMALIB, reason="anomalib is not installed (extra peers)")


@pytest.mark.skipif(HAS_ANOMALIB, reason="anomalib is installed")
def test_without_anomalib_one_line_says_how_to_install_it(texture_set: Path, tmp_path: Path) -> None:
    arguments = ["accuracy", "--sets", texture_set, "--peers", "--work", tmp_path]
    line = [sys.executable, "-m", "meliad_edge.benchmarks", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == MissingExtraError.exit_code
    assert done.stderr.splitlines() == ["error      anomalib is not installed; run: pip install 'meliad-edge[peers]'"]
    images = TrainingImages(np.zeros((2, 64, 64, 3), np.uint8), np.zeros((0, 64, 64, 3), np.uint8))
    for peer in PEERS:
        with pytest.raises(MissingExtraError):
            create_detector(peer.detector).fit(images, FeatureExtractor(load_backbone(strides=(8, 16))), seed=0)


def test_peers_have_names_of_their_own() -> None:
    jobs = [Job("elpv", "elpv", peer.detector, shots=0, seed=0, options=peer.options) for peer in PEERS]
    assert [type(job.create_detector()).__name__ for job in jobs] == ["AnomalibPatchcore", "AnomalibPadim"]
    assert all("anomalib" in line for line in LEFT_OUT)


@needs_anomalib
def test_anomalib_sees_the_features_of_our_backbone_and_scores_as_defined() -> None:
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    backbone = load_backbone(strides=(8, 16))
    patchcore: Any = create_detector("anomalib-patchcore", {"candidates": 200, "coreset_ratio": 0.5, "neighbours": 1})
    fitted = patchcore.fit(
        TrainingImages(frames[:4], frames[4:]), FeatureExtractor(load_backbone(strides=(8, 16))), seed=1
    )
    network: Any = fitted.network
    model = network.model
    assert model.memory_bank.shape == (100, 152)
    with torch.inference_mode():
        fine, coarse = (
            torch.nn.functional.avg_pool2d(level, 3, 1, 1) for level in backbone(torch.from_numpy(frames[4:]))
        )
        coarse = torch.nn.functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        patches = torch.cat([fine, coarse], 1).permute(0, 2, 3, 1).reshape(2, -1, 152)
        expected = torch.cdist(patches, model.memory_bank, compute_mode="donot_use_mm_for_euclid_dist").min(-1).values
        score, evidence, nearest = network(torch.from_numpy(frames[4:]))
    assert score.tolist() == pytest.approx(expected.amax(1).tolist(), rel=1e-3)
    assert evidence.shape == (2, 64, 64)
    assert (nearest == -1).all()


@needs_anomalib
def test_rows_of_peers_are_without_labels_and_resume(texture_set: Path, tmp_path: Path) -> None:
    plan = Plan(
        variants=(),
        peers=PEERS,
        sets=(str(texture_set),),
        settings=(),
        data_folder=tmp_path,
        set_cache=tmp_path / "sets",
        feature_cache=None,
        work=tmp_path / "results",
        seeds=1,
        image_size=64,
        workers=1,
    )
    result = run(plan)
    assert [(row["label"], row["setting"]) for row in result["rows"]] == [
        ("anomalib PatchCore", "0-shot"),
        ("anomalib PaDiM", "0-shot"),
    ]
    for row in result["rows"]:
        assert row["mean"]["image_auroc"] > 0.6
        assert row["mean"]["pixel_auroc"] > 0.6
    assert run(plan)["rows"] == result["rows"]
