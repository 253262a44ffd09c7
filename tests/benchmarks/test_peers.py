from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from meliad_edge.benchmarks import peer_models, peers_page
from meliad_edge.benchmarks.peer_graph import ENGINES, EngineName, PeerGraph, Runner, model_input
from meliad_edge.benchmarks.peer_models import PEERS, SMALL_BANK, Peer
from meliad_edge.benchmarks.peers import Entrant, HeldOut, build_peers, describe, measure

pytestmark = pytest.mark.workshop

HAS_ANOMALIB = importlib.util.find_spec("anomalib") is not None
needs_anomalib = pytest.mark.skipif(not HAS_ANOMALIB, reason="anomalib is not installed (extra peers)")

# Bright frames are anomalous, and so is the dark one.
FRAMES = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30, 200, 210, 5)])
HELD_OUT = HeldOut(FRAMES, np.array([False, False, False, True, True, True]))


def entrant(name: str, score: Callable[[NDArray[np.uint8]], float], **options: Any) -> Entrant:
    def open_on(engine: EngineName, threads: int | None) -> Runner:
        return lambda frame: (score(frame), np.zeros((1, 1), np.float32))

    facts: dict[str, Any] = {
        "maker": "anomalib",
        "labelled_defects": 0,
        "weights": "of a test",
        "is_fitted": True,
        "engines": ("onnxruntime",),
        "open": open_on,
        **options,
    }
    return Entrant(name, **facts)


def brightness(frame: NDArray[np.uint8]) -> float:
    return float(frame.mean())


def test_accuracy_is_measured_where_weights_are_real_and_times_are_over_ours() -> None:
    entrants = [
        entrant("meliad, FP32", brightness, maker="meliad-edge"),
        entrant("random", brightness, is_fitted=False),
    ]
    ours, untrained = measure(entrants, HELD_OUT, rounds=2, threads=[1, 2])
    measured = ours["engines"]["onnxruntime"]
    # The dark anomaly ranks below all three normals, the bright ones above: 6 of 9 pairs.
    assert measured["image_auroc"] == pytest.approx(6 / 9)
    assert measured["image_auroc_ci"][0] <= 6 / 9 <= measured["image_auroc_ci"][1]
    assert list(measured["latency"]) == ["1", "2"]
    assert measured["latency"]["1"]["over"] == {"fp32": {"median": 1.0, "ci": [1.0, 1.0]}}
    unmeasured = untrained["engines"]["onnxruntime"]
    assert unmeasured["image_auroc"] is None
    assert unmeasured["image_ap"] is None
    assert unmeasured["latency"]["1"]["median_ms"] > 0.0


def test_an_engine_that_fails_or_gives_no_finite_score_is_a_reason_and_the_rest_goes_on() -> None:
    def refuse(engine: EngineName, threads: int | None) -> Runner:
        msg = "unsupported operator Frobnicate\nand a page of details"
        raise RuntimeError(msg)

    calls = []

    def tires(frame: NDArray[np.uint8]) -> float:
        calls.append(frame)
        if len(calls) > len(FRAMES) + 3:
            msg = "out of memory"
            raise MemoryError(msg)
        return brightness(frame)

    rows = measure(
        [
            entrant("meliad, FP32", brightness),
            entrant("refused", brightness, open=refuse),
            entrant("blind", lambda frame: float("nan"), is_fitted=False),
            entrant("tired", tires),
        ],
        HELD_OUT,
        rounds=1,
        threads=[1],
    )
    reasons = {row["model"]: row["engines"]["onnxruntime"].get("not_run") for row in rows}
    assert reasons == {
        "meliad, FP32": None,
        "refused": "RuntimeError: unsupported operator Frobnicate",
        "blind": "ModelError: the score (nan) or a cell of the map is not a finite number",
        "tired": "MemoryError: out of memory",
    }


def test_a_peer_that_cannot_be_built_is_a_row_with_its_reason(tmp_path: Path) -> None:
    def offline(frames: NDArray[np.uint8], seed: int) -> Any:
        msg = "[Errno -2] Name or service not known"
        raise OSError(msg)

    built, not_built = build_peers([Peer("EfficientAD-S", offline)], FRAMES, tmp_path)
    assert built == []
    assert not_built == [
        {"model": "EfficientAD-S", "maker": "anomalib", "not_run": "OSError: [Errno -2] Name or service not known"}
    ]


def test_frames_are_timed_normal_and_anomalous_in_turn() -> None:
    assert [int(frame[0, 0, 0]) for frame in HELD_OUT.in_turn()] == [10, 200, 20, 210, 30, 5]


@pytest.fixture
def graph(tmp_path: Path) -> PeerGraph:
    """A graph with the inputs and outputs of an exported one: the score is the sum of all pixels, the map their sum
    over the colours."""
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])
    outputs = [
        helper.make_tensor_value_info("pred_score", TensorProto.FLOAT, [1, 1, 1, 1]),
        helper.make_tensor_value_info("pred_label", TensorProto.BOOL, [1, 1, 1, 1]),
        helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, [1, 1, 8, 8]),
    ]
    constants = [
        helper.make_tensor("colours", TensorProto.INT64, [1], [1]),
        helper.make_tensor("half", TensorProto.FLOAT, [1], [0.5]),
    ]
    nodes = [
        helper.make_node("ReduceSum", ["input"], ["pred_score"]),
        helper.make_node("Greater", ["pred_score", "half"], ["pred_label"]),
        helper.make_node("ReduceSum", ["input", "colours"], ["anomaly_map"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "peer", [image], outputs, constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return PeerGraph(path, "none", is_fitted=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_gets_pixels_from_0_to_1_and_gives_score_and_map(graph: PeerGraph, engine: EngineName) -> None:
    if engine != "onnxruntime":
        pytest.importorskip("openvino")
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[2, 5] = (255, 51, 0)
    score, evidence = graph.open(engine, 1)(frame)
    assert score == pytest.approx(1.2, rel=1e-2)
    assert evidence.shape == (1, 1, 8, 8)
    assert evidence[0, 0, 2, 5] == pytest.approx(1.2, rel=1e-2)
    assert np.count_nonzero(evidence) == 1


@needs_anomalib
def test_the_input_is_what_anomalibs_own_inferencer_makes() -> None:
    from anomalib.deploy import OpenVINOInferencer

    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model_input(frame), OpenVINOInferencer.pre_process(frame))


@needs_anomalib
def test_exported_models_score_as_anomalib_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_models, "_hub_refusal", lambda backbone: "not asked")
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    by_name = {peer.name: peer for peer in PEERS}
    graph = by_name["PatchCore, ResNet-18"].export(frames, 0, tmp_path / "patchcore")
    # A tenth of four times 8 x 8 patches.
    assert graph.memory_bank == 25
    score, evidence = graph.open("onnxruntime", 1)(frames[0])
    assert np.isfinite(score)
    assert evidence.shape == (1, 1, 64, 64)
    ours = by_name["PaDiM, EfficientNet-Lite0"]
    graph = ours.export(frames, 0, tmp_path / "padim")
    assert graph.is_fitted
    from meliad_edge.benchmarks.peer_detectors import AnomalibPadim
    from meliad_edge.models.backbone import load_backbone
    from meliad_edge.models.features import FeatureExtractor
    from meliad_edge.models.network import TrainingImages
    from meliad_edge.runtime.torch_engine import TorchEngine

    detector = AnomalibPadim()
    images = TrainingImages(frames, frames[:0])
    fitted = detector.fit(images, FeatureExtractor(load_backbone(strides=detector.strides)), seed=0)
    expected = TorchEngine(fitted.network).infer(frames[:1])
    score, evidence = graph.open("onnxruntime", 1)(frames[0])
    assert score == pytest.approx(float(expected.score[0]), rel=1e-3)
    np.testing.assert_allclose(evidence[0, 0], expected.map[0], rtol=1e-2, atol=1e-2)


def engine_row(ms: float, auroc: float | None) -> dict[str, Any]:
    over = {
        "fp32": {"median": ms / 5.0, "ci": [ms / 5.5, ms / 4.5]},
        "int8": {"median": ms / 2.5, "ci": [ms / 2.6, ms / 2.4]},
    }
    accuracy = None if auroc is None else [auroc - 0.02, auroc + 0.02]
    return {
        "image_auroc": auroc,
        "image_ap": auroc,
        "image_auroc_ci": accuracy,
        "image_ap_ci": accuracy,
        "latency": {"1": {"median_ms": ms, "over": over}, "2": {"median_ms": ms / 2, "over": over}},
    }


def row(name: str, maker: str, engines: dict[str, Any], bank: int | None = None) -> dict[str, Any]:
    return {
        "model": name,
        "maker": maker,
        "labelled_defects": 10 if maker == "meliad-edge" else 0,
        "weights": "ImageNet" if maker == "meliad-edge" else "random: a test",
        "memory_bank": bank,
        "engines": engines,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    ours = {"onnxruntime": engine_row(5.0, 0.9274), "openvino-f32": engine_row(9.0, 0.9271)}
    padim = {
        "onnxruntime": engine_row(31.0, 0.906),
        "openvino": engine_row(20.0, 0.713),
        "openvino-f32": engine_row(30.0, 0.906),
    }
    patchcore = {
        "onnxruntime": engine_row(640.0, None),
        "openvino": engine_row(771.0, None),
        "openvino-f32": {"not_run": "RuntimeError: out of memory"},
    }
    rows = [
        row("meliad, FP32", "meliad-edge", ours),
        row("PaDiM, Lite0", "anomalib", padim),
        row("PatchCore, ResNet-18", "anomalib", patchcore, bank=86_835),
        {"model": "STFPM", "maker": "anomalib", "not_run": "OSError: no network"},
    ]
    return {
        "benchmark": "peers",
        "data": "elpv",
        "seed": 0,
        "input_hw": [256, 256],
        "fit_chooses": "256 x 256 pixels, square",
        "train_normals": 848,
        "test_images": 1082,
        "rounds": 15,
        "threads": [1, 2],
        "openvino_arithmetic": "bf16",
        "rows": rows,
        "environment": {
            "date": "2026-11-26T01:55:12Z",
            "cpu": "AMD EPYC",
            "cores": 2,
            "system": "Linux",
            "python": "3.11.7",
            "packages": {"anomalib": "2.7.0"},
            "commit": "e54b4a957710",
        },
        "command": "python -m meliad_edge.benchmarks peers",
    }


def test_the_table_invents_nothing(result: dict[str, Any]) -> None:
    page = peers_page.to_markdown(result)
    table = page.partition("## 1 thread\n")[2].partition("## 2 threads\n")[0]
    lines = {cells[1]: cells[2:-1] for cells in (re.split(r" *\| *", line) for line in table.strip().splitlines())}
    assert lines["meliad, FP32"] == [
        "10", "5.00", "–", "9.00", "1.00 (0.91 to 1.11)", "2.00 (1.92 to 2.08)", ".927", ".927",
    ]  # fmt: skip
    # The fastest engine counts, though it ranks worse; every engine's accuracy is told where they differ.
    assert lines["PaDiM, Lite0"][4] == "4.00 (3.64 to 4.44)"
    assert lines["PaDiM, Lite0"][6] == ".906 / .713 / .906"
    assert lines["PatchCore, ResNet-18"] == [
        "none", "640", "771", "–", "128 (116 to 142)", "256 (246 to 267)", "–", "–",
    ]  # fmt: skip
    assert "STFPM" not in lines
    assert "* STFPM: not run: OSError: no network." in page
    assert "memory bank of 86,835 patches; OpenVINO in FP32 not run: RuntimeError: out of memory." in page
    assert "Measured: 2026-11-26 at commit e54b4a957710." in page


def test_lines_for_people_name_every_engine(result: dict[str, Any]) -> None:
    texts = [text for _, text in describe(result)]
    assert "PatchCore, ResNet-18, openvino-f32: not run: RuntimeError: out of memory" in texts
    assert (
        "PaDiM, Lite0, openvino: AUROC 0.713; 20.00 ms on 1 thread, 4.00 x ours; 10.00 ms on 2 threads, 4.00 x ours"
        in texts
    )
    assert "STFPM: not run: OSError: no network" in texts


def test_points_without_accuracy_are_drawn_apart(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peers_page.plot(result, tmp_path / "peers.svg")
    drawn = (tmp_path / "peers.svg").read_text()
    assert drawn.index("image AUROC, elpv") < drawn.index("accuracy not measured")
    peers_page.plot(result, tmp_path / "peers.png")
    image = cv2.imread(str(tmp_path / "peers.png"))
    assert image is not None
    assert image[0, 0].tolist() == [255, 255, 255]
    assert (tmp_path / "peers.png").stat().st_size < 150_000


def test_every_model_that_is_promised_has_a_recipe() -> None:
    names = [peer.name for peer in PEERS]
    assert {"PatchCore, ResNet-18", "PatchCore, WideResNet-50", "PaDiM, ResNet-18", "STFPM, ResNet-18"} < set(names)
    assert {"EfficientAD-S", "EfficientAD-M", "SuperSimpleNet, WideResNet-50"} < set(names)
    assert len(set(names)) == len(names)
    assert SMALL_BANK == 5_000
