"""A run folder to a ``.meliad`` file, refused unless the file decides as the run does."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meliad_edge import __version__
from meliad_edge.bundle import GoldenFrame, Manifest, write_bundle
from meliad_edge.data.dataset import Sample
from meliad_edge.data.frames import load_frames
from meliad_edge.errors import ParityError
from meliad_edge.export.graph import export_graph
from meliad_edge.models import create_detector
from meliad_edge.parity import ParityResult, compare, require_parity
from meliad_edge.precision import DEFAULT_LIMITS
from meliad_edge.run import Run
from meliad_edge.runtime.engine import Engine, RawScores, infer_all
from meliad_edge.runtime.kernel_library import find_kernel_library
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from meliad_edge.runtime.torch_engine import TorchEngine

_GOLDEN_FRAMES = 8

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplayFrames:
    """The frames a parity check replays: calibration normals and the shots, with what the run says of them.

    Attributes:
        frames: uint8 RGB [n, H, W, 3].
        samples: Where they came from.
        reference: What the trained network gives.
    """

    frames: NDArray[np.uint8]
    samples: tuple[Sample, ...]
    reference: RawScores


def replay_frames(run: Run) -> ReplayFrames:
    """Read the calibration normals and the shots of a run and score them with the trained network."""
    loaded = load_frames((*run.split.calibration, *run.split.shots), run.network.input_hw, "reading frames")
    for error in loaded.errors:
        _logger.warning("left out of the replay: %s", error)
    reference = infer_all(TorchEngine(run.network), loaded.frames, "pytorch")
    return ReplayFrames(loaded.frames, loaded.samples, reference)


def check_parity(run: Run, model: bytes, replay: ReplayFrames) -> list[ParityResult]:
    """Replay frames through every engine of this machine that can execute the graph.

    Raises:
        ParityError: The graph takes frames of another size.
    """
    engines: list[Engine] = [OnnxRuntimeEngine(model, use_kernel=False)]
    if find_kernel_library() is not None:
        engines.append(OnnxRuntimeEngine(model))
    if engines[0].input_size_hw != run.network.input_hw:
        (height, width), (ours, _) = engines[0].input_size_hw, run.network.input_hw
        msg = f"the model takes {width} x {height} pixels, the run {ours} x {ours}; it was exported from another run"
        raise ParityError(msg)
    names = [sample.path.name for sample in replay.samples]
    return [
        compare(engine.name, replay.reference, infer_all(engine, replay.frames, engine.name), run.calibration, names)
        for engine in engines
    ]


def export_bundle(run: Run, out: Path) -> tuple[Manifest, list[ParityResult]]:
    """Export a run and write the bundle if parity holds.

    Raises:
        ParityError: An engine of this machine does not decide as the trained network.
    """
    model = export_graph(run.network).SerializeToString(deterministic=True)
    replay = replay_frames(run)
    results = check_parity(run, model, replay)
    require_parity(results)
    manifest = Manifest(
        name=out.stem[:200],
        detector=run.config.detector,
        backbone=run.config.backbone if create_detector(run.config.detector).strides else "none",
        input_hw=run.network.input_hw,
        grid_hw=run.network.grid_hw,
        top_cells=run.network.top_cells,
        precisions={"fp32": DEFAULT_LIMITS["fp32"]},
        created_by=f"meliad-edge {__version__}",
        dataset=run.dataset[:200],
        licence=run.licence,
        train_normals=len(run.split.train_normal),
        shots=len(run.split.shots),
    )
    return write_bundle(out, manifest, {"fp32": model}, run.calibration, _golden(run, replay), run.exemplars), results


def _golden(run: Run, replay: ReplayFrames) -> list[GoldenFrame]:
    """The frames nearest to the threshold on either side: where a changed decision would show first."""
    distance = np.abs(replay.reference.score - run.calibration.threshold)
    nearest = np.argsort(distance, kind="stable")
    anomalous = [i for i in nearest if replay.samples[i].is_anomaly][: _GOLDEN_FRAMES // 2]
    normal = [i for i in nearest if not replay.samples[i].is_anomaly][: _GOLDEN_FRAMES - len(anomalous)]
    return [
        GoldenFrame(
            name=replay.samples[i].path.name,
            defect=replay.samples[i].defect,
            frame=replay.frames[i],
            score=float(replay.reference.score[i]),
            map=replay.reference.map[i],
        )
        for i in (*normal, *anomalous)
    ]
