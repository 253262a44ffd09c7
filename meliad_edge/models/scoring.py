"""Patch-wise entropy scoring in PyTorch: the differentiable form of ``kernels/reference``.

See docs/method.md, section "Scoring": class energies from prototypes, entropy of the class posterior,
evidence damped by that entropy, and the mean of the top cells. Steps 4 to 6 follow our reconstruction of
MeLIAD (arXiv 2409.13602); class energies from prototypes are our extension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class ScoringParameters:
    """The scalars of the scoring; attributes of the exported node.

    Attributes:
        n_normal: Rows of the prototype matrix that belong to the normal class; the rest is anomalous.
        top_cells: Cells whose mean is the score.
        softness: Temperature T of the soft minimum over distances, above 0.
        normal_scale: Weight of the distance to the normal class.
        anomaly_scale: Weight of the distance to the anomaly class.
        bias: Constant of the anomaly energy.
        kappa: How strongly uncertain cells are damped, in [0, 1).
        offset: Constant b0 added to the mean of the top cells.
    """

    n_normal: int
    top_cells: int
    softness: float
    normal_scale: float
    anomaly_scale: float
    bias: float
    kappa: float
    offset: float


def patch_entropy_score(
    embeddings: Tensor, prototypes: Tensor, direction: Tensor, parameters: ScoringParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """Score embeddings against class prototypes.

    Args:
        embeddings: [N, D, H, W].
        prototypes: [K, D], the normal class first.
        direction: [D], the class-specific embedding of the anomaly class.
        parameters: Scalars.

    Returns:
        Score [N], map [N, H, W], and nearest [N, 2, H, W] int64 (prototype index per class).
    """
    count, _, height, width = embeddings.shape
    cells = embeddings.flatten(2).transpose(1, 2)  # [N, HW, D]
    squared = (
        cells.square().sum(-1, keepdim=True) + prototypes.square().sum(-1) - 2.0 * (cells @ prototypes.T)
    )  # [N, HW, K]
    distances = squared.clamp_min(0.0).sqrt()
    normal, anomalous = distances[..., : parameters.n_normal], distances[..., parameters.n_normal :]
    energy_normal = -parameters.normal_scale * _soft_minimum(normal, parameters.softness)
    energy_anomaly = (
        -parameters.anomaly_scale * _soft_minimum(anomalous, parameters.softness) + cells @ direction + parameters.bias
    )
    evidence = entropy_evidence(energy_anomaly - energy_normal, parameters.kappa)
    score = evidence.topk(parameters.top_cells, dim=-1).values.mean(-1) + parameters.offset
    nearest = torch.stack([normal.argmin(-1), anomalous.argmin(-1) + parameters.n_normal], dim=1)
    return score, evidence.view(count, height, width), nearest.view(count, 2, height, width)


def entropy_evidence(log_odds: Tensor, kappa: float | Tensor) -> Tensor:
    """Evidence of the anomaly class, damped where the class posterior is uncertain.

    e = (1 - kappa * H(p)) * x with p = sigmoid(x) and H its entropy in bits. [ours]
    """
    probability = torch.sigmoid(log_odds)
    entropy_bits = (functional.softplus(log_odds) - log_odds * probability) / math.log(2.0)
    return (1.0 - kappa * entropy_bits) * log_odds


def _soft_minimum(distances: Tensor, softness: float) -> Tensor:
    return -softness * torch.logsumexp(distances / -softness, dim=-1)
