"""Rounded weights against a plain reference: on their grid, and kinder to results than the nearest values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper, parser

from meliad_edge.export.weight_rounding import round_weights

pytestmark = pytest.mark.workshop


def convolution(attributes: str, shape: tuple[int, ...], seed: int) -> ModelProto:
    model = parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 18]>
        one (uint8[batch, H, W, 24] frames) => (float[batch, C, h, w] y)
        {{
            floats = Cast<to = 1>(frames)
            x = Transpose<perm = [0, 3, 1, 2]>(floats)
            y = Conv<{attributes}>(x, weight)
        }}
        """
    )
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    return model


def weight_of(model: ModelProto) -> NDArray[np.float32]:
    return np.asarray(numpy_helper.to_array(model.graph.initializer[0]))


def correlated_frames(seed: int, count: int = 6) -> NDArray[np.uint8]:
    """Channels and neighbours alike, as in pictures."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(count, 5, 6, 1)).repeat(4, axis=1).repeat(4, axis=2)
    noise = 0.4 * random.normal(size=(count, 20, 24, 24))
    return np.clip(90 + 40 * (coarse + noise), 0, 255).astype(np.uint8)


def gptq_of_one_row(weights: NDArray[np.float64], moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slow and plain: round a weight, then move all that are left to the minimum of the error, by least squares."""
    step = np.abs(weights).max() / 127
    moments = moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
    order = np.argsort(-np.diag(moments), kind="stable")
    ideal, rounded = weights.copy(), np.zeros_like(weights)
    for position, index in enumerate(order):
        done, free = order[: position + 1], order[position + 1 :]
        is_largest = np.abs(weights[index]) == np.abs(weights).max()
        rounded[index] = weights[index] if is_largest else np.clip(np.round(ideal[index] / step), -127, 127) * step
        # The free weights that minimise (w - q)' H (w - q), given those that are rounded.
        change = np.linalg.solve(moments[np.ix_(free, free)], moments[np.ix_(free, done)] @ (weights - rounded)[done])
        ideal[free] = weights[free] + change
    return rounded


CASES: list[tuple[str, tuple[int, ...]]] = [
    ("kernel_shape = [1, 1]", (5, 24, 1, 1)),
    ("pads = [1, 1, 1, 1]", (4, 24, 3, 3)),
    ("pads = [1, 0, 2, 1], strides = [2, 2], group = 24", (24, 1, 3, 3)),
    ("group = 2, dilations = [2, 1]", (6, 12, 3, 2)),
]


@pytest.mark.parametrize(("attributes", "shape"), CASES)
def test_results_change_less_than_with_the_nearest_weights(
    attributes: str, shape: tuple[int, ...], run_graph: Callable[..., Any]
) -> None:
    model = convolution(attributes, shape, seed=shape[0])
    weight, frames = weight_of(model), correlated_frames(1)
    rounded = round_weights(model, frames)["weight"]
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1).reshape(-1, 1, 1, 1)
    multiples = rounded / (largest / 127)
    np.testing.assert_allclose(multiples, np.round(multiples), atol=1e-3)
    np.testing.assert_allclose(np.abs(multiples).reshape(len(weight), -1).max(axis=1), 127, rtol=1e-6)

    def error(values: NDArray[np.float32]) -> float:
        changed = ModelProto()
        changed.CopyFrom(model)
        changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "weight"))
        unseen = correlated_frames(2)
        return float(np.square(run_graph(changed, unseen) - run_graph(model, unseen)).mean())

    nearest = (np.round(weight / (largest / 127)) * (largest / 127)).astype(np.float32)
    assert error(rounded) < 0.5 * error(nearest)


def test_rounding_is_that_of_the_slow_reference() -> None:
    model = convolution("kernel_shape = [1, 1]", (3, 24, 1, 1), seed=11)
    frames = correlated_frames(3)
    inputs: NDArray[Any] = frames.reshape(-1, 24).astype(np.float64)
    moments = inputs.T @ inputs
    weight = weight_of(model).reshape(3, 24)
    expected = [gptq_of_one_row(row.astype(np.float64), moments) for row in weight]
    np.testing.assert_allclose(round_weights(model, frames)["weight"].reshape(3, 24), expected, rtol=1e-5)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(expected - np.round(weight / step) * step) > step / 2).mean() > 0.1


def test_inputs_that_are_always_zero_give_the_nearest_weights() -> None:
    model = convolution("kernel_shape = [1, 1]", (3, 24, 1, 1), seed=5)
    weight = weight_of(model)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    rounded = round_weights(model, np.zeros((1, 8, 8, 24), np.uint8))["weight"]
    np.testing.assert_allclose(rounded, np.round(weight / step) * step, rtol=1e-5)


def test_a_channel_of_zeros_stays_zero() -> None:
    model = convolution("kernel_shape = [1, 1]", (3, 24, 1, 1), seed=5)
    weight = weight_of(model).copy()
    weight[1] = 0.0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))
    rounded = round_weights(model, correlated_frames(4))["weight"]
    assert not rounded[1].any()
    assert np.isfinite(rounded).all()
