"""Our exported models and anomalib's, side by side: frame in memory to score and map, and accuracy on one split.

In one process, interleaved, on the engines that each would be run with. ``pip install 'meliad-edge[peers]'`` brings
what it needs. Models are built, exported and thrown away again in every run: some ten minutes before the timing starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.interleaved import Ratio, Rounds, time_rounds
from meliad_edge.benchmarks.peer_graph import ENGINES, EngineName, PeerGraph, Runner, openvino_arithmetic
from meliad_edge.benchmarks.peer_models import PEERS, Peer
from meliad_edge.benchmarks.pool import NOT_RUN
from meliad_edge.bundle import Bundle, open_bundle
from meliad_edge.cli.output import say
from meliad_edge.config import FitConfig
from meliad_edge.data.frames import load_frames
from meliad_edge.errors import ModelError
from meliad_edge.export.portable import to_portable
from meliad_edge.export.to_bundle import export_bundle
from meliad_edge.input_choice import choose_input_size
from meliad_edge.metrics import image_metrics
from meliad_edge.precision import Precision
from meliad_edge.progress import track
from meliad_edge.run import Run
from meliad_edge.runtime.load import make_predictor
from meliad_edge.runtime.openvino_engine import OpenVinoEngine
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.train import fit

SIZE = 256
SHOTS = 10
SEED = 0
OURS, THEIRS = "meliad-edge", "anomalib"
_TOPICS = {OURS: "ours", THEIRS: "theirs"}
# What every other is compared with, on the engine that watch runs.
REFERENCES: dict[Precision, str] = {"fp32": "meliad, FP32", "int8": "meliad, INT8"}
REFERENCE_ENGINE: EngineName = "onnxruntime"
_TIMED_FRAMES = 32
_ROUNDS = 15
_THREADS = (1, 2)
_ACCURACY = ("image_auroc", "image_ap", "image_auroc_ci", "image_ap_ci")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Frames no model was fitted on.

    Attributes:
        frames: uint8 RGB [n, H, W, 3] at model size.
        is_anomaly: Of each, bool [n].
    """

    frames: NDArray[np.uint8]
    is_anomaly: NDArray[np.bool_]

    def in_turn(self) -> list[NDArray[np.uint8]]:
        """At most 32 frames for timing, normal and anomalous in turn: content matters to our kernel."""
        kinds = (np.flatnonzero(self.is_anomaly == kind) for kind in (False, True))
        return [self.frames[index] for pair in zip(*kinds, strict=False) for index in pair][:_TIMED_FRAMES]


@dataclass(frozen=True, slots=True)
class Entrant:
    """One model of the comparison.

    Attributes:
        name: First cell of its row.
        maker: ``OURS`` or ``THEIRS``.
        labelled_defects: It was fitted with.
        weights: Which weights it has.
        is_fitted: Whether its scores mean something; else its accuracy is not measured.
        engines: It can be run on.
        open: Puts it on one of them with a number of threads; None leaves them to the engine.
        memory_bank: Patches its memory holds; None for a method without one.
    """

    name: str
    maker: str
    labelled_defects: int
    weights: str
    is_fitted: bool
    engines: tuple[EngineName, ...]
    open: Callable[[EngineName, int | None], Runner]
    memory_bank: int | None = None


def run(
    data: str = "elpv",
    rounds: int = _ROUNDS,
    threads: Sequence[int] = _THREADS,
    feature_cache: Path | None = None,
    peers: Sequence[Peer] = PEERS,
) -> dict[str, Any]:
    """Build, export, score the test images and time, all at 256 x 256 pixels, batch 1.

    Args:
        data: Data set, as ``fit`` takes it.
        rounds: Rounds that are timed, see :func:`~meliad_edge.benchmarks.interleaved.time_rounds`.
        threads: Numbers of threads of the engines; everything is timed with each of them.
        feature_cache: Folder with backbone features.
        peers: anomalib's models.

    Returns:
        JSON values: for every model a row, see :func:`measure`, or the reason why it has none; ``fit_chooses``, the
        input size that ``fit`` would take where it is not set.

    Raises:
        MeliadError: Our own models cannot be fitted or exported.
    """
    with tempfile.TemporaryDirectory(prefix="meliad-peers-") as name:
        folder = Path(name)
        fitted = _fit(data, SHOTS, folder / "run", feature_cache)
        entrants = _ours(fitted, _fit(data, 0, folder / "run-without", feature_cache), folder)
        normals = load_frames(fitted.split.train_normal, (SIZE, SIZE), "reading normals").frames
        built, not_built = build_peers(peers, normals, folder)
        test = load_frames(fitted.split.test, (SIZE, SIZE), "reading test")
        held_out = HeldOut(test.frames, np.array([sample.is_anomaly for sample in test.samples]))
        rows = measure([*entrants, *built], held_out, rounds, threads)
    order = [entrant.name for entrant in entrants] + [peer.name for peer in peers]
    return {
        "benchmark": "peers",
        "data": fitted.dataset,
        "seed": SEED,
        "input_hw": [SIZE, SIZE],
        "fit_chooses": _chosen_input(fitted),
        "train_normals": len(normals),
        "test_images": len(held_out.frames),
        "rounds": rounds,
        "threads": list(threads),
        "openvino_arithmetic": openvino_arithmetic(),
        "rows": sorted([*rows, *not_built], key=lambda row: order.index(row["model"])),
        "environment": describe_environment(),
    }


def build_peers(
    peers: Sequence[Peer], normals: NDArray[np.uint8], folder: Path
) -> tuple[list[Entrant], list[dict[str, Any]]]:
    """Export anomalib's models.

    Args:
        peers: The models.
        normals: uint8 RGB [n, H, W, 3], normal images to fit on.
        folder: Where the graphs go.

    Returns:
        Those that could be exported, and for each of the others a row with its reason.
    """
    built, not_built = [], []
    for index, peer in enumerate(peers):
        say("anomalib", f"exporting {peer.name}")
        try:
            graph = peer.export(normals, SEED, folder / f"peer-{index}")
        except Exception as error:  # anomalib, torch and timm have no common base class for what they raise
            not_built.append({"model": peer.name, "maker": THEIRS, NOT_RUN: _reason(error)})
        else:
            built.append(_entrant(peer.name, graph))
    return built, not_built


def measure(entrants: Sequence[Entrant], test: HeldOut, rounds: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    """Score the test images with everything, then time everything in turn.

    Args:
        entrants: The models.
        test: The test images.
        rounds: Rounds that are timed.
        threads: Numbers of threads of the engines.

    Returns:
        A row for each model, JSON values. For each of its engines: ``image_auroc`` and ``image_ap`` with their
        intervals, as that engine computes them, None where the weights are not those of a fitted model; and by number
        of threads ``median_ms``, and the ratios to ``REFERENCES`` on ONNX Runtime, each with its interval. An engine
        that fails has its reason instead.
    """
    rows = [
        {
            "model": entrant.name,
            "maker": entrant.maker,
            "labelled_defects": entrant.labelled_defects,
            "weights": entrant.weights,
            "memory_bank": entrant.memory_bank,
            "engines": {engine: _accuracy(entrant, engine, test) for engine in entrant.engines},
        }
        for entrant in entrants
    ]
    for count in threads:
        say("timing", f"{count} thread{'s' * (count > 1)}")
        _time(entrants, rows, test.in_turn(), rounds, count)
    return rows


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    lines = [("ours", f"input {SIZE} x {SIZE}; fit would take {result['fit_chooses']}")]
    for row in result["rows"]:
        if NOT_RUN in row:
            lines.append((_TOPICS[row["maker"]], f"{row['model']}: not run: {row[NOT_RUN]}"))
            continue
        for engine, measured in row["engines"].items():
            lines.append((_TOPICS[row["maker"]], f"{row['model']}, {engine}: {_describe_engine(measured)}"))
    return lines


def _describe_engine(measured: dict[str, Any]) -> str:
    if NOT_RUN in measured:
        return f"not run: {measured[NOT_RUN]}"
    auroc = measured["image_auroc"]
    parts = ["AUROC not measured" if auroc is None else f"AUROC {auroc:.3f}"]
    for count, latency in measured["latency"].items():
        over = latency["over"].get("fp32")
        times = "" if over is None else f", {over['median']:.2f} x ours"
        parts.append(f"{latency['median_ms']:.2f} ms on {count} thread{'s' * (count != '1')}{times}")
    return "; ".join(parts)


def _fit(data: str, shots: int, folder: Path, feature_cache: Path | None) -> Run:
    config = FitConfig(data=data, image_size=SIZE, shots=shots, seed=SEED, feature_cache=feature_cache)
    return fit(config, folder, say)


def _ours(fitted: Run, fitted_without: Run, folder: Path) -> list[Entrant]:
    """Both precisions of the default detector, and the same without labels, which anomalib's cannot use either."""
    entrants = []
    sources: list[tuple[Run, tuple[Precision, ...]]] = [(fitted, ("fp32", "int8")), (fitted_without, ("fp32",))]
    for source, precisions in sources:
        shots = source.config.shots
        path = folder / f"{shots}.meliad"
        say("export", f"meliad with {shots} labelled defects")
        export_bundle(source, path, precisions)
        bundle = open_bundle(path)
        for precision in precisions:
            entrants.append(
                Entrant(
                    name=REFERENCES[precision] + (", no labelled defects" if shots == 0 else ""),
                    maker=OURS,
                    labelled_defects=shots,
                    weights=f"ImageNet, {bundle.manifest.backbone}",
                    is_fitted=True,
                    engines=(REFERENCE_ENGINE, "openvino-f32"),
                    open=_opener(bundle, precision),
                )
            )
    return entrants


def _opener(bundle: Bundle, precision: Precision) -> Callable[[EngineName, int | None], Runner]:
    def open_bundle_on(engine: EngineName, threads: int | None) -> Runner:
        if engine == "onnxruntime":
            predictor = make_predictor(bundle, precision=precision, engine="onnxruntime", threads=threads)
        else:
            portable = OpenVinoEngine(to_portable(bundle.models[precision]), threads=threads)
            predictor = Predictor(bundle, portable, precision)

        def run_frame(frame: NDArray[np.uint8]) -> tuple[float, NDArray[np.float32]]:
            prediction = predictor.predict(frame)
            return prediction.score, prediction.map

        return run_frame

    return open_bundle_on


def _entrant(name: str, graph: PeerGraph) -> Entrant:
    return Entrant(name, THEIRS, 0, graph.weights, graph.is_fitted, ENGINES, graph.open, graph.memory_bank)


def _chosen_input(fitted: Run) -> str:
    config = fitted.config.model_copy(update={"image_size": None})
    return str(choose_input_size(config, fitted.split.train_normal))


def _accuracy(entrant: Entrant, engine: EngineName, test: HeldOut) -> dict[str, Any]:
    """What ``measure`` says of an engine, with no times yet."""
    try:
        runner = entrant.open(engine, None)
        score, evidence = runner(test.frames[0])
        if not (np.isfinite(score) and np.all(np.isfinite(evidence))):
            msg = f"the score ({score}) or a cell of the map is not a finite number"
            raise ModelError(msg)
        if not entrant.is_fitted:
            return {**dict.fromkeys(_ACCURACY), "latency": {}}
        indices = track(range(len(test.frames)), _key(entrant.name, engine)[:40])
        scores = [runner(test.frames[index])[0] for index in indices]
        metrics = image_metrics(scores, test.is_anomaly).to_dict()
    except Exception as error:  # one engine that fails is a row, not the end
        return {NOT_RUN: _reason(error)}
    return {**{name: metrics[name] for name in _ACCURACY}, "latency": {}}


def _time(
    entrants: Sequence[Entrant],
    rows: Sequence[dict[str, Any]],
    frames: Sequence[NDArray[np.uint8]],
    rounds: int,
    threads: int,
) -> None:
    """Add the times to the rows."""
    runners: dict[str, Runner] = {}
    cells: dict[str, dict[str, Any]] = {}
    for entrant, row in zip(entrants, rows, strict=True):
        for engine, measured in row["engines"].items():
            if NOT_RUN not in measured:
                key = _key(entrant.name, engine)
                runners[key] = entrant.open(engine, threads)
                cells[key] = measured
    timed = time_rounds(runners, frames, rounds, np.random.default_rng(SEED))
    references = {
        precision: key
        for precision, name in REFERENCES.items()
        if (key := _key(name, REFERENCE_ENGINE)) in timed.medians_s
    }
    for key, measured in cells.items():
        if key in timed.failures:
            measured[NOT_RUN] = timed.failures[key]
            continue
        measured["latency"][str(threads)] = {
            "median_ms": timed.median_ms(key),
            "over": {precision: _ratio(timed, key, reference) for precision, reference in references.items()},
        }


def _ratio(timed: Rounds, key: str, reference: str) -> dict[str, Any]:
    ratio: Ratio = timed.ratio(key, reference)
    return {"median": ratio.median, "ci": [ratio.low, ratio.high]}


def _key(name: str, engine: EngineName) -> str:
    return f"{name}, {engine}"


def _reason(error: Exception) -> str:
    """Kind and first line, which is where libraries say what happened."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:200]
