from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meliad_edge.bundle import open_bundle
from meliad_edge.calibrate import calibrate
from meliad_edge.device_threshold import LiveThreshold, threshold_file
from meliad_edge.runtime.load import load_predictor

WriteVideo = Callable[..., Path]


def test_good_parts_of_a_video_give_the_threshold(
    bundle: Path, write_video: WriteVideo, invoke: Callable[..., Any]
) -> None:
    levels = np.random.default_rng(0).integers(20, 60, 120).tolist()
    video = write_video("good.avi", levels)
    outcome = invoke("threshold", bundle, "--from", video, "--false-alarm-rate", 0.05, "--frames", 60, "--json")
    assert outcome.code == 0, outcome.err
    assert "good parts 60 frames, 0 of them at or above the bundle's threshold" in outcome.err
    calibration = load_predictor(bundle).bundle.calibration
    assert calibration.count == 60
    assert calibration.threshold == outcome.json["threshold"] == pytest.approx(59, abs=3)
    assert calibration == calibrate(calibration.scores, target_false_alarm_rate=0.05)
    assert open_bundle(bundle).calibration.threshold > 100
    assert invoke("threshold", bundle, "--reset").code == 0
    assert load_predictor(bundle).bundle.calibration == open_bundle(bundle).calibration


def test_a_threshold_that_is_moved_at_work_keeps_the_scores_of_the_camera(
    bundle: Path, write_video: WriteVideo, invoke: Callable[..., Any]
) -> None:
    invoke("threshold", bundle, "--from", write_video("good.avi", list(range(20, 80))))
    predictor = load_predictor(bundle)
    threshold = LiveThreshold(predictor, bundle)
    scores = threshold.calibration.scores
    assert len(scores) == 60
    preview = threshold.preview(false_alarm_rate=0.5)
    assert preview == calibrate(scores, target_false_alarm_rate=0.5)
    assert threshold.move(false_alarm_rate=0.5) == preview
    assert predictor.bundle.calibration == preview
    assert load_predictor(bundle).bundle.calibration == preview
    assert threshold.move(value=70.0).scores == scores
    assert threshold.reset().count == 3
    assert not threshold_file(bundle).exists()


def test_a_live_camera_and_its_view_from_the_camera_file(
    bundle: Path, mjpeg_server: Any, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    config = tmp_path / "cameras.toml"
    # The right half of this camera's picture is white; its left half counts up.
    config.write_text(f'[[camera]]\nsource = "{mjpeg_server.url}"\nname = "line 3"\nregion = [0, 0, 32, 48]\n')
    outcome = invoke("threshold", bundle, "--from", "line 3", "--config", config, "--frames", 30, "--every", 0.02)
    assert outcome.code == 0, outcome.err
    scores = json.loads(threshold_file(bundle).read_text())["scores"]
    assert len(scores) == 30
    assert max(scores) < 250


def test_too_few_frames_and_bad_sources_are_said(bundle: Path, write_video: WriteVideo, invoke: Any) -> None:
    outcome = invoke("threshold", bundle, "--from", write_video("short.avi", [20] * 12))
    assert (outcome.code, threshold_file(bundle).exists()) == (2, False)
    assert "short.avi: 12 frames; a threshold needs at least 30 of good parts" in outcome.err
    assert invoke("threshold", bundle, "--from", "missing.avi").code == 7
    assert invoke("threshold", bundle, "--reset", "--from", "missing.avi").code == 2


def test_parts_that_alarm_are_pointed_out(bundle: Path, write_video: WriteVideo, invoke: Any) -> None:
    outcome = invoke("threshold", bundle, "--from", write_video("bad.avi", [200] * 40))
    assert outcome.code == 0
    assert "most of them alarm: are these good parts" in outcome.err
