"""The definition of the operator ``meliad.PatchEntropyScore``: every implementation is tested against this file."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray


class PatchEntropy(NamedTuple):
    """Outputs of the operator."""

    score: NDArray[Any]
    map: NDArray[Any]
    nearest: NDArray[np.int64]


def patch_entropy_score(
    z: NDArray[np.float32],
    prototypes: NDArray[np.float32],
    direction: NDArray[np.float32],
    *,
    n_normal: int,
    top_cells: int,
    softness: float,
    normal_scale: float,
    anomaly_scale: float,
    bias: float,
    kappa: float,
    offset: float,
    dtype: DTypeLike = np.float64,
) -> PatchEntropy:
    """Score patch embeddings against prototypes of two classes, with the entropy of each cell as its doubt. Ours.

    A cell that cannot be scored, because its embedding holds NaN or Inf or its distances overflow, gets the map value
    NaN, and its image the score NaN: it never looks normal. Its nearest prototypes are the first of each class.

    Args:
        z: Patch embeddings, [N, D, H, W].
        prototypes: [K, D]; the first ``n_normal`` rows stand for normality, the others for anomalies.
        direction: Learned direction of anomaly, [D].
        n_normal: In [1, K).
        top_cells: Number of cells behind the score, in [1, H*W].
        softness: T > 0, in units of distance; towards 0 the soft minimum becomes the minimum.
        normal_scale: s_n.
        anomaly_scale: s_a.
        bias: b.
        kappa: Weight of the entropy, in [0, 1).
        offset: b0.
        dtype: Precision of the computation; float64 is the definition, float32 the plain version it is compared with.

    Returns:
        score [N], map [N, H, W] and nearest, int64 [N, 2, H, W]: indices of the nearest prototype of each class,
        the lowest index on ties.
    """
    z, prototypes, direction = (np.asarray(array, dtype) for array in (z, prototypes, direction))
    softness, normal_scale, anomaly_scale, bias, kappa, offset = (
        np.asarray(value, dtype) for value in (softness, normal_scale, anomaly_scale, bias, kappa, offset)
    )
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        z = np.moveaxis(z, 1, -1)  # [N, H, W, D]
        z = np.where(np.isfinite(z).all(axis=-1, keepdims=True), z, np.asarray(np.nan, dtype))
        squared = (z * z).sum(-1, keepdims=True) + (prototypes * prototypes).sum(-1) - 2 * (z @ prototypes.T)
        d = np.sqrt(np.maximum(0, squared))  # [N, H, W, K]
        normal, anomaly = d[..., :n_normal], d[..., n_normal:]

        activation_normal = -normal_scale * _soft_minimum(normal, softness)
        activation_anomaly = -anomaly_scale * _soft_minimum(anomaly, softness) + z @ direction + bias
        x = activation_anomaly - activation_normal
        evidence = (1 - kappa * _binary_entropy_bits(x)) * x
        evidence = np.where(np.isfinite(evidence), evidence, np.asarray(np.nan, dtype))  # [N, H, W]

    images, height, width = evidence.shape
    top = np.sort(evidence.reshape(images, height * width))[:, -top_cells:]  # NaN sorts last, so it is among them
    score = top.mean(axis=-1) + offset
    nearest = np.stack([normal.argmin(-1), n_normal + anomaly.argmin(-1)], axis=1)
    return PatchEntropy(score, evidence, nearest.astype(np.int64))


def _soft_minimum(d: NDArray[Any], softness: NDArray[Any]) -> NDArray[Any]:
    """-T log sum_k exp(-d_k / T), shifted by the minimum so that nothing overflows."""
    minimum = d.min(axis=-1, keepdims=True)
    total = np.exp((minimum - d) / softness).sum(axis=-1)
    return np.asarray(minimum[..., 0] - softness * np.log(total))


def _binary_entropy_bits(x: NDArray[Any]) -> NDArray[Any]:
    """H(p) = -p log2 p - (1 - p) log2(1 - p) of p = sigmoid(x), written in q = exp(-|x|) to keep its tails exact."""
    q = np.exp(-np.abs(x))
    return np.asarray((np.log1p(q) + np.abs(x) * q / (1 + q)) / np.log(2).astype(x.dtype))
