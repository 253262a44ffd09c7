"""What labelled defects add to the evidence of a cell: distance to their patches, direction towards them [ours]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meliad_edge.models.prototypes import choose_prototypes, nearest_distance

ANOMALY_PROTOTYPES = 128
# Share of a shot's patches, the most deviating ones, that stand for its defect.
DEVIATING_SHARE = 0.15
# Weights that the evidence of defects approaches with many shots, in units of normal distances and of their spread.
ANOMALY_WEIGHT = 0.18
DIRECTION_WEIGHT = 0.135
# Each shot is left out with those of its fold; up to so many shots alone.
_FOLDS = 10


@dataclass(frozen=True, slots=True)
class Normality:
    """What shots are compared with.

    Attributes:
        prototypes: Of the normal class, float32 [K, D].
        reference: Embeddings of normal images that no prototype comes from, float32 [n, h, w, D].
        distances: Of the reference to the prototypes, float32 [n, h, w].
        whitened: Numbers of an embedding, the first ones, that a direction may use.
    """

    prototypes: NDArray[np.float32]
    reference: NDArray[np.float32]
    distances: NDArray[np.float32]
    whitened: int


@dataclass(frozen=True, slots=True)
class LabelTerms:
    """The labels' part of the evidence.

    Attributes:
        prototypes: Of the anomaly class, float32 [K, D]; of no shots one row of zeros.
        weight: Of the distance to the nearest of them; with no shots 0.
        direction: float32 [D].
    """

    prototypes: NDArray[np.float32]
    weight: float
    direction: NDArray[np.float32]

    def __call__(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Evidence of embeddings [..., D], [...]."""
        return embeddings @ self.direction - np.float32(self.weight) * nearest_distance(embeddings, self.prototypes)


@dataclass(frozen=True, slots=True)
class ShotPatches:
    """What label terms are fitted on.

    Attributes:
        deviating: The patches of each shot that are farthest from normality, float32 [m, count, D].
        means: Mean patch of each shot, float32 [m, D].
    """

    deviating: NDArray[np.float32]
    means: NDArray[np.float32]

    @classmethod
    def of(cls, shots: NDArray[np.float32], normal_prototypes: NDArray[np.float32]) -> ShotPatches:
        """Of embeddings [m, h, w, D], m may be 0."""
        by_image = shots.reshape(len(shots), math.prod(shots.shape[1:3]), shots.shape[-1])
        deviation = nearest_distance(by_image, normal_prototypes)
        count = max(1, round(DEVIATING_SHARE * deviation.shape[1]))
        rows = np.argsort(-deviation, axis=1, kind="stable")[:, :count]
        return cls(np.take_along_axis(by_image, rows[..., None], axis=1), by_image.mean(axis=1))

    def __getitem__(self, chosen: NDArray[np.bool_]) -> ShotPatches:
        """Those of some shots."""
        return ShotPatches(self.deviating[chosen], self.means[chosen])


def fit_label_terms(
    patches: ShotPatches, normality: Normality, *, anomaly_weight: float, direction_weight: float, seed: int
) -> LabelTerms:
    """Prototypes of the most deviating patches, and the direction from the mean normal patch to the mean of shots.

    Both count for more the more shots there are. The direction starts with the second one, for that of one is mostly
    the part and not its defect.

    Args:
        patches: Of the shots, of which there may be none.
        normality: What is normal.
        anomaly_weight: Weight that the distance approaches with many shots, in normal distances.
        direction_weight: Weight that the direction approaches with many shots, in spreads of normal distances.
        seed: Of the prototypes.
    """
    count, depth = patches.means.shape
    if not count:
        return LabelTerms(np.zeros((1, depth), np.float32), 0.0, np.zeros(depth, np.float32))
    direction = patches.means.mean(axis=0) - normality.reference.mean(axis=(0, 1, 2))
    direction[normality.whitened :] = 0.0
    direction *= spread_ratio(normality.distances, normality.reference @ direction)
    return LabelTerms(
        prototypes=choose_prototypes(patches.deviating.reshape(-1, depth), ANOMALY_PROTOTYPES, seed),
        weight=anomaly_weight * count / (count + 2),
        direction=direction * np.float32(direction_weight * (count - 1) / (count + 2)),
    )


def left_out_evidence(
    shots: NDArray[np.float32],
    patches: ShotPatches,
    normality: Normality,
    *,
    anomaly_weight: float,
    direction_weight: float,
    seed: int,
) -> NDArray[np.float32]:
    """Evidence of each shot by terms that were fitted without it, less their mean on normal patches, [m, h, w].

    A defect is near its own patches, which says nothing of the next one. Of a single shot it is 0.

    Args:
        shots: Embeddings, float32 [m, h, w, D], m at least 1.
        patches: Of these shots.
        normality: What is normal.
        anomaly_weight: As for :func:`fit_label_terms`.
        direction_weight: As for :func:`fit_label_terms`.
        seed: Of the prototypes.
    """
    evidence = np.empty(shots.shape[:3], np.float32)
    for fold in range(min(_FOLDS, len(shots))):
        left_out = np.arange(len(shots)) % _FOLDS == fold
        terms = fit_label_terms(
            patches[~left_out],
            normality,
            anomaly_weight=anomaly_weight,
            direction_weight=direction_weight,
            seed=seed,
        )
        evidence[left_out] = terms(shots[left_out]) - terms(normality.reference).mean()
    return evidence


def spread_ratio(distances: NDArray[np.float32], term: NDArray[np.float32], least: float = 1e-12) -> float:
    """What gives a term of the evidence the spread of the distances; none where it has less than ``least`` itself."""
    spread = float(term.std())
    return float(distances.std()) / spread if spread > least else 0.0
