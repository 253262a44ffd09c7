"""A run folder to a ``.meliad`` file, refused unless the file decides as the run does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from meliad_edge import __version__
from meliad_edge.bundle import GoldenFrame, Manifest, write_bundle
from meliad_edge.data.dataset import Sample
from meliad_edge.data.frames import load_frames
from meliad_edge.data.input_size import in_words
from meliad_edge.errors import ParityError
from meliad_edge.export.engines import processor_engines
from meliad_edge.export.graph import export_graph
from meliad_edge.export.lower import EMULATED_HALF, LayerError, Replay, lower
from meliad_edge.export.portable import to_portable
from meliad_edge.models import create_detector
from meliad_edge.parity import ParityResult, compare, require_parity
from meliad_edge.precision import PRECISIONS, Precision
from meliad_edge.run import Run
from meliad_edge.runtime.engine import Engine, infer_all
from meliad_edge.runtime.torch_engine import TorchEngine

_GOLDEN_FRAMES = 8
_RANGE_NORMALS = 100

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplaySet:
    """The frames a parity check replays: calibration normals and the shots.

    Attributes:
        replay: The frames, and what the trained network says of them.
        samples: Where they came from.
    """

    replay: Replay
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """The graphs of a run, each proven to decide as the run does.

    Attributes:
        models: The serialised graph of every precision.
        layers: What lowering did to each layer, for every precision below FP32.
        parity: Every engine with every precision against the trained network.
    """

    models: Mapping[Precision, bytes]
    layers: Mapping[Precision, tuple[LayerError, ...]]
    parity: tuple[ParityResult, ...]


def read_replay(run: Run) -> ReplaySet:
    """Read the calibration normals and the shots of a run and score them with the trained network."""
    loaded = load_frames((*run.split.calibration, *run.split.shots), run.network.input_hw, "reading frames")
    for error in loaded.errors:
        _logger.warning("left out of the replay: %s", error)
    reference = infer_all(TorchEngine(run.network), loaded.frames, "pytorch")
    names = [sample.path.name for sample in loaded.samples]
    return ReplaySet(Replay(loaded.frames, names, reference, run.calibration), loaded.samples)


def check_parity(run: Run, engines: Sequence[Engine], precision: Precision, replay: Replay) -> list[ParityResult]:
    """Replay frames through engines that execute a graph of the run.

    Raises:
        ParityError: The graph takes frames of another size.
    """
    if engines[0].input_size_hw != run.network.input_hw:
        taken, ours = in_words(engines[0].input_size_hw), in_words(run.network.input_hw)
        msg = f"the model takes {taken} pixels, the run {ours}; it was exported from another run"
        raise ParityError(msg)
    limits = run.config.limits_of(precision)
    return [
        compare(
            engine.name,
            precision,
            replay.reference,
            infer_all(engine, replay.frames, f"{engine.name} {precision}"),
            replay.calibration,
            limits,
            replay.names,
        )
        for engine in engines
    ]


def export_models(run: Run, precisions: Sequence[Precision], replay: Replay) -> ExportedModel:
    """Export a run in FP32 and in the precisions asked for.

    Raises:
        ParityError: A precision, or an engine of this machine, does not decide as the trained network.
    """
    reference = export_graph(run.network)
    models: dict[Precision, bytes] = {}
    layers: dict[Precision, tuple[LayerError, ...]] = {}
    results: list[ParityResult] = []
    for precision in PRECISIONS:
        if precision == "fp32":
            model = reference
        elif precision in precisions:
            lowered = lower(reference, precision, _training_frames(run), replay, run.config.limits_of(precision))
            model, layers[precision] = lowered.model, lowered.layers
            results += [result for result in lowered.parity if result.engine == EMULATED_HALF]
        else:
            continue
        onnx.checker.check_model(model, full_check=True)
        models[precision] = bytes(model.SerializeToString(deterministic=True))
        results += check_parity(run, processor_engines(models[precision]), precision, replay)
        require_parity(results)
    return ExportedModel(models, layers, tuple(results))


def export_bundle(
    run: Run,
    out: Path,
    precisions: Sequence[Precision] = (),
    sign: Callable[[bytes], bytes] | None = None,
) -> tuple[Manifest, ExportedModel]:
    """Export a run and write the bundle if parity holds.

    Args:
        run: The run.
        out: Bundle to write.
        precisions: What it carries beside FP32.
        sign: Gives the signature of its manifest; None leaves it unsigned.

    Raises:
        ParityError: A precision, or an engine of this machine, does not decide as the trained network.
    """
    replayed = read_replay(run)
    exported = export_models(run, precisions, replayed.replay)
    manifest = Manifest(
        name=out.stem[:200],
        detector=run.config.detector,
        backbone=run.config.backbone if create_detector(run.config.detector).strides else "none",
        input_hw=run.network.input_hw,
        grid_hw=run.network.grid_hw,
        top_cells=run.network.top_cells,
        precisions={precision: run.config.limits_of(precision) for precision in exported.models},
        created_by=f"meliad-edge {__version__}",
        dataset=run.dataset[:200],
        licence=run.licence,
        notes=run.config.notes,
        train_normals=run.learned_normals,
        shots=run.learned_shots,
    )
    golden = _golden(replayed)
    written = write_bundle(out, manifest, exported.models, run.calibration, golden, run.exemplars, sign=sign)
    return written, exported


def export_portable(run: Run, out: Path, precision: Precision) -> ExportedModel:
    """Export a run as one graph in standard ONNX operators, if parity holds.

    Raises:
        ParityError: The precision, or an engine of this machine, does not decide as the trained network.
    """
    exported = export_models(run, [precision], read_replay(run).replay)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(to_portable(exported.models[precision]))
    partial.replace(out)
    return replace(exported, models={precision: out.read_bytes()})


def _training_frames(run: Run) -> NDArray[np.uint8]:
    """What the ranges of INT8 are measured on: the training normals and the shots, which no threshold rests on."""
    normals = run.split.train_normal[:: max(1, len(run.split.train_normal) // _RANGE_NORMALS)][:_RANGE_NORMALS]
    return load_frames((*normals, *run.split.shots), run.network.input_hw, "reading training").frames


def _golden(replayed: ReplaySet) -> list[GoldenFrame]:
    """The frames nearest to the threshold on either side: where a changed decision would show first."""
    replay, samples = replayed.replay, replayed.samples
    distance = np.abs(replay.reference.score - replay.calibration.threshold)
    nearest = np.argsort(distance, kind="stable")
    anomalous = [i for i in nearest if samples[i].is_anomaly][: _GOLDEN_FRAMES // 2]
    normal = [i for i in nearest if not samples[i].is_anomaly][: _GOLDEN_FRAMES - len(anomalous)]
    return [
        GoldenFrame(
            name=samples[i].path.name,
            defect=samples[i].defect,
            frame=replay.frames[i],
            score=float(replay.reference.score[i]),
            map=replay.reference.map[i],
        )
        for i in (*normal, *anomalous)
    ]
