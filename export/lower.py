"""A graph in lower precision that still decides as the network that was trained, or a refusal that says why.

Layers that lose too much stay in FP32: each layer is lowered alone, and its error on the scores of real frames is
measured. Any that loses too much by itself is left out, and of the first layers, which lose most and gain least, more
and more until every frame is decided as before. [ours]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, TensorProto, ValueInfoProto, numpy_helper

from meliad_edge.calibrate import Calibration
from meliad_edge.errors import ParityError
from meliad_edge.export.engines import processor_engines
from meliad_edge.export.half import ROUNDED, emulate_fp16, to_fp16
from meliad_edge.export.quantize import Quantizer
from meliad_edge.export.region import Layer, layers
from meliad_edge.export.scoring_function import OPERATOR
from meliad_edge.parity import ParityResult, compare
from meliad_edge.precision import ParityLimits, Precision
from meliad_edge.progress import track
from meliad_edge.runtime.engine import Engine, RawScores, infer_all
from meliad_edge.runtime.onnxruntime_engine import OnnxRuntimeEngine

# Frames, those nearest to the threshold, that the error of one layer is measured on.
_LAYER_FRAMES = 32
_TENSOR_FRAMES = 4
# How many of the first layers are left out, one attempt after the other, up to half of all. INT8 never gets the first
# three: with few channels on large maps they lose most and gain no time.
_ATTEMPTS: dict[Precision, tuple[int, ...]] = {"fp16": (0, 3, 6, 12, 24), "int8": (3, 6, 9, 12, 18, 24)}
# A layer that alone changes scores by more than this, as a fraction of the spread, is left out wherever it is.
_LARGEST_ERROR_ALONE = 0.05
_ALIGNMENT_STEPS = 4
# Room left between the threshold and the nearest score, as a fraction of the spread, where there is as much.
_ALIGNMENT_MARGIN = 0.02

EMULATED_HALF = "emulated half"

Build = Callable[[Collection[str]], ModelProto]


@dataclass(frozen=True, slots=True)
class LayerError:
    """What lowering one layer does.

    Attributes:
        layer: Its name.
        score_error: Root mean square change of the scores when this layer alone is lowered, as a fraction of the
            distance from the typical normal score to the threshold.
        signal_to_noise_db: Of its result in the lowered graph, against the same tensor in FP32.
        precision: What it runs in.
    """

    layer: str
    score_error: float
    signal_to_noise_db: float
    precision: Precision


@dataclass(frozen=True, slots=True)
class LoweredGraph:
    """A graph in lower precision that passed.

    Attributes:
        model: The graph.
        layers: One per convolution, in the order of the network.
        parity: The comparison of every engine that judged it with the reference.
    """

    model: ModelProto
    layers: tuple[LayerError, ...]
    parity: tuple[ParityResult, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """Frames, and what the trained network says of them.

    Attributes:
        frames: uint8 RGB [n, H, W, 3].
        names: One per frame.
        reference: Results of the trained network.
        calibration: Its threshold and scale.
    """

    frames: NDArray[np.uint8]
    names: Sequence[str]
    reference: RawScores
    calibration: Calibration

    def nearest_to_threshold(self, count: int) -> Replay:
        """The frames whose decisions are the first to change."""
        chosen = np.argsort(np.abs(self.reference.score - self.calibration.threshold), kind="stable")[:count]
        raw = self.reference
        return replace(
            self,
            frames=self.frames[chosen],
            names=[self.names[i] for i in chosen],
            reference=RawScores(raw.score[chosen], raw.map[chosen], raw.nearest[chosen]),
        )


def lower(
    model: ModelProto,
    precision: Precision,
    training_frames: NDArray[np.uint8],
    replay: Replay,
    limits: ParityLimits,
) -> LoweredGraph:
    """Lower the precision of a graph as far as its decisions allow.

    Args:
        model: The FP32 graph; not changed.
        precision: ``"fp16"`` or ``"int8"``.
        training_frames: Frames that the ranges of INT8 are measured on, uint8 RGB [n, H, W, 3].
        replay: Frames that must be decided as before.
        limits: Largest errors that pass.

    Raises:
        ParityError: With the first half of the layers in FP32 decisions still change; says which frame, and which
            layers lose most. Or there is no layer to lower.
    """
    found = layers(model)
    if not found:
        msg = f"{precision} is refused: the graph has no convolutions; export without --precision {precision}"
        raise ParityError(msg)
    build = _to_builder(model, precision, training_frames)
    alone = _errors_alone(build, found, replay, precision)
    half = len(found) // 2
    for count in [attempt for attempt in _ATTEMPTS[precision] if attempt < half] + [half]:
        kept = [layer for i, layer in enumerate(found) if i < count or alone[layer.output] > _LARGEST_ERROR_ALONE]
        keep_fp32 = [node for layer in kept for node in layer.nodes]
        trial = build(keep_fp32)
        results = _align(trial, precision, replay, limits)
        if all(result.passed for result in results):
            lowered = to_fp16(model, keep_fp32) if precision == "fp16" else trial
            untouched = _weights_of(model) & _weights_of(lowered)
            noise = _signal_to_noise(model, trial, found, replay.frames[:_TENSOR_FRAMES])
            errors = tuple(
                LayerError(
                    layer.name,
                    alone[layer.output],
                    noise[layer.output],
                    "fp32" if layer.weight in untouched else precision,
                )
                for layer in found
            )
            return LoweredGraph(lowered, errors, results)
    by_error = sorted(found, key=lambda layer: -alone[layer.output])
    worst = ", ".join(f"{layer.name} ({alone[layer.output]:.1%})" for layer in by_error[:3])
    msg = (
        f"{precision} is refused: even with the first half of {len(found)} layers in FP32, "
        f"{next(result for result in results if not result.passed).describe_failure()}; most is lost in {worst}; "
        f"export without --precision {precision}, or allow more in the project file under [limits.{precision}]"
    )
    raise ParityError(msg)


def _to_builder(model: ModelProto, precision: Precision, training_frames: NDArray[np.uint8]) -> Build:
    """What makes a graph that shows the errors of the lowered one, given the names of nodes that stay in FP32."""
    if precision == "fp16":
        return lambda keep_fp32: emulate_fp16(model, keep_fp32)
    return Quantizer(model, training_frames).quantize


def _weights_of(model: ModelProto) -> set[str]:
    return {node.input[1] for node in model.graph.node if node.op_type == "Conv"}


def _errors_alone(build: Build, found: Sequence[Layer], replay: Replay, precision: Precision) -> dict[str, float]:
    near = replay.nearest_to_threshold(_LAYER_FRAMES)
    every_node = {node for layer in found for node in layer.nodes}
    errors = {}
    for layer in track(found, f"{precision} layer by layer"):
        engine = OnnxRuntimeEngine(_to_bytes(build(every_node - set(layer.nodes))))
        difference = engine.infer(near.frames).score - near.reference.score
        errors[layer.output] = float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
    return {name: error / replay.calibration.spread for name, error in errors.items()}


def _align(trial: ModelProto, precision: Precision, replay: Replay, limits: ParityLimits) -> tuple[ParityResult, ...]:
    """Fit the scale and the bias of the log odds so that scores and decisions stay as they were [ours].

    Rounding adds distance to every patch, which pulls all scores together and moves them. The scale takes the first
    back, the bias the second: of all shifts that keep every decision on every engine, which round sums of bytes
    differently, the one nearest to the mean error is taken.
    """
    spread, threshold = replay.calibration.spread, replay.calibration.threshold
    results, scores = _compare(trial, precision, replay, limits)
    log_odds = _LogOdds.of(trial)
    if log_odds is None or precision == "fp16":
        return results
    reference = np.tile(replay.reference.score, len(results))
    log_odds.scale(_slope(scores, reference))
    for _ in range(_ALIGNMENT_STEPS):
        results, scores = _compare(trial, precision, replay, limits)
        shift = _best_shift(reference, scores, threshold, spread)
        if abs(shift) < 1e-3 * spread:
            return results
        log_odds.shift(shift)
    return _compare(trial, precision, replay, limits)[0]


def _slope(scores: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Of the line through the scores that is nearest to the reference."""
    centred = scores - scores.mean()
    variance = float(np.mean(np.square(centred)))
    return float(np.mean(centred * (reference - reference.mean()))) / variance if variance > 0.0 else 1.0


@dataclass(frozen=True, slots=True)
class _LogOdds:
    """What scales and shifts the log odds of a graph's scoring node.

    Attributes:
        parameters: Attributes of the node, by name.
        direction: Its third input, a constant.
    """

    parameters: Mapping[str, AttributeProto]
    direction: TensorProto

    @classmethod
    def of(cls, model: ModelProto) -> _LogOdds | None:
        """Of the graph's scoring node, or None where it has none."""
        node = next((node for node in model.graph.node if node.op_type == OPERATOR), None)
        if node is None:
            return None
        constants = {initializer.name: initializer for initializer in model.graph.initializer}
        return cls({attribute.name: attribute for attribute in node.attribute}, constants[node.input[2]])

    def scale(self, factor: float) -> None:
        """Multiply by a factor."""
        for name in ("normal_scale", "anomaly_scale", "bias"):
            self.parameters[name].f *= factor
        scaled = numpy_helper.to_array(self.direction) * np.float32(factor)
        self.direction.CopyFrom(numpy_helper.from_array(scaled, self.direction.name))

    def shift(self, amount: float) -> None:
        """Add a constant."""
        self.parameters["bias"].f += amount


def _best_shift(reference: NDArray[np.float32], scores: NDArray[np.float32], threshold: float, spread: float) -> float:
    mean_error = float(np.mean(reference - scores))
    is_alarm = reference >= threshold
    if is_alarm.all() or not is_alarm.any():
        return mean_error
    lowest, highest = threshold - float(scores[is_alarm].min()), threshold - float(scores[~is_alarm].max())
    if lowest >= highest:
        return mean_error
    margin = min(0.25 * (highest - lowest), _ALIGNMENT_MARGIN * spread)
    return float(np.clip(mean_error, lowest + margin, highest - margin))


def _compare(
    trial: ModelProto, precision: Precision, replay: Replay, limits: ParityLimits
) -> tuple[tuple[ParityResult, ...], NDArray[np.float32]]:
    """What every engine makes of the frames, and their scores, engine after engine."""
    engines: dict[str, Engine] = (
        {EMULATED_HALF: OnnxRuntimeEngine(_to_bytes(trial))}
        if precision == "fp16"
        else {engine.name: engine for engine in processor_engines(_to_bytes(trial))}
    )
    raws = {name: infer_all(engine, replay.frames, f"{name} {precision}") for name, engine in engines.items()}
    results = tuple(
        compare(name, precision, replay.reference, raw, replay.calibration, limits, replay.names)
        for name, raw in raws.items()
    )
    return results, np.concatenate([raw.score for raw in raws.values()])


def _signal_to_noise(
    model: ModelProto, trial: ModelProto, found: Sequence[Layer], frames: NDArray[np.uint8]
) -> dict[str, float]:
    made = {name for node in trial.graph.node for name in node.output}
    names = [layer.output for layer in found]
    # What a lowered layer hands on: what its Q/DQ pair makes of its result, or its result rounded to half precision.
    trial_names = [
        next((other for other in (f"{name}_DequantizeLinear_Output", name + ROUNDED) if other in made), name)
        for name in names
    ]
    signal, noise = np.zeros(len(names)), np.zeros(len(names))
    exact, rounded = (
        ort.InferenceSession(_to_bytes(_with_outputs(graph, outputs)), providers=["CPUExecutionProvider"])
        for graph, outputs in ((model, names), (trial, trial_names))
    )
    for frame in frames:
        feed = {"frames": frame[np.newaxis]}
        for index, (a, b) in enumerate(zip(exact.run(names, feed), rounded.run(trial_names, feed), strict=True)):
            signal[index] += np.square(a, dtype=np.float64).sum()
            noise[index] += np.square(a - b, dtype=np.float64).sum()
    ratio = 10.0 * np.log10(np.maximum(signal, 1e-30) / np.maximum(noise, 1e-30))
    return {layer.output: float(value) for layer, value in zip(found, ratio, strict=True)}


def _with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return copy


def _to_bytes(model: ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))
