"""MeLIAD: metric learning and entropy-based scoring [ours, after arXiv 2409.13602].

What the paper's abstract states is kept: a learned metric over patch embeddings, class-specific embeddings,
an entropy-based score that is interpretable by design, learned from a few anomalies without augmentation.
The prototypes of both classes are our extension; docs/method.md says which part comes from where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor, extract_features, patch_features
from meliad_edge.models.label_terms import (
    ANOMALY_WEIGHT,
    DIRECTION_WEIGHT,
    Normality,
    ShotPatches,
    fit_label_terms,
    left_out_evidence,
    spread_ratio,
)
from meliad_edge.models.meliad_network import (
    DEVIATION,
    DEVIATION_SCALE,
    PLACE_NUMBERS,
    TRAINED,
    MeliadNetwork,
    length_damping,
    load_metric,
    load_places,
)
from meliad_edge.models.network import Detector, FittedDetector, PatchSite, TrainingImages, register
from meliad_edge.models.places import PlaceGaussians, fit_places, place_features
from meliad_edge.models.prototypes import choose_prototypes, nearest_distance, nearest_patch
from meliad_edge.models.scoring import ScoringParameters
from meliad_edge.models.trained_direction import train_direction
from meliad_edge.models.whitening import Whitening, fit_whitening

# Directions of largest variance that an embedding keeps.
WHITENED = 320
NORMAL_PROTOTYPES = 512
# How far places where normal images deviate more, or less, than elsewhere are evened out.
PLACE_BOUNDS = (0.5, 2.0)
# Images that a place's own deviation must be worth to count as much as that of all places.
PLACE_PRIOR = 20
# Weight of the deviation from what is normal at a place: its spread over normal cells, in spreads of normal distances.
PLACE_WEIGHT = 1.25
# Spread of deviations from what is normal at a place in the training of the direction; that of the others is 1.
PLACE_SPREAD = 2.0
TOP_SHARE = 0.025
SOFTNESS = 0.01
KAPPA = 0.5
# Of the training of the direction.
STEPS = 100
# Normal training images that the spread and the scale of the evidence are estimated on.
_SCALE_IMAGES = 200
_PROTOTYPE_IMAGES = 500


# Embeddings [n, h, w, D], deviations from places [n, h, w, d] and evidence [n, h, w].
_Images = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Cells:
    """Embedded patches of one set of images, float32 [n, h, w, D]."""

    embeddings: NDArray[np.float32]

    @property
    def flat(self) -> NDArray[np.float32]:
        """[n * h * w, D]."""
        return self.embeddings.reshape(-1, self.embeddings.shape[-1])

    def site(self, kind: Literal["normal", "shots"], index: int) -> PatchSite:
        """Where the patch of that flat index is."""
        image, row, column = np.unravel_index(index, self.embeddings.shape[:3])
        return PatchSite(kind, int(image), (int(row), int(column)))


@register("meliad")
@dataclass(frozen=True, slots=True)
class Meliad(Detector):
    """Fits the metric and the prototypes of both classes in closed form, then trains the direction between them.

    Attributes:
        even_places: Scale embeddings so that normal images deviate alike at every place.
        anomaly_weight: Weight that the distance to anomaly prototypes approaches with many shots.
        direction_weight: Weight that the direction approaches with many shots, in spreads of normal distances.
        place_weight: Weight of the deviation from what is normal at a place, in spreads of normal distances.
        steps: Of the training of the direction; with 0 labels add only a distance and the difference of the means.
        kappa: How strongly uncertain cells are damped, in [0, 1).
    """

    even_places: bool = True
    anomaly_weight: Annotated[float, Field(ge=0.0, le=10.0)] = ANOMALY_WEIGHT
    direction_weight: Annotated[float, Field(ge=0.0, le=10.0)] = DIRECTION_WEIGHT
    place_weight: Annotated[float, Field(ge=0.0, le=10.0)] = PLACE_WEIGHT
    steps: Annotated[int, Field(ge=0, le=10_000)] = STEPS
    kappa: Annotated[float, Field(ge=0.0, lt=1.0)] = KAPPA

    strides: ClassVar[tuple[int, ...]] = (8, 16, 32)
    even_light: ClassVar[bool] = True

    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Fit on normal images and any number of labelled anomalies, none included."""
        patches, of_places = extract_features(
            features, images.normal, "features of normals", _metric_features, _place_features
        )
        channels = patches.shape[-1]
        whitening = fit_whitening(patches.reshape(-1, channels)).main_directions(
            min(WHITENED, channels - PLACE_NUMBERS)
        )
        order = np.random.default_rng(seed).permutation(len(patches))
        # The scale of distances is honest only on images that no prototype comes from.
        scale_count = min(_SCALE_IMAGES, max(1, len(order) // 5))
        for_scale, for_prototypes = order[:scale_count], order[scale_count:][:_PROTOTYPE_IMAGES]
        if not len(for_prototypes):
            for_prototypes = for_scale
        typical_length = float(np.linalg.norm(whitening(patches[for_scale]), axis=-1).mean())
        normal = _embed(patches, whitening, typical_length)
        place_scale = np.ones(patches.shape[1:3], np.float32)
        if self.even_places:
            place_scale = _place_scale(normal.embeddings[for_prototypes], normal.embeddings[for_scale], seed)
        places = fit_places(of_places[for_prototypes])
        _add_places(normal, place_scale, places, of_places)
        normal_prototypes = choose_prototypes(_Cells(normal.embeddings[for_prototypes]).flat, NORMAL_PROTOTYPES, seed)
        reference = normal.embeddings[for_scale]
        distances = nearest_distance(reference, normal_prototypes)
        sites = [normal.site("normal", int(index)) for index in nearest_patch(normal_prototypes, normal.flat)]

        depth = reference.shape[-1]
        place_term = np.zeros(depth, np.float32)
        # Where the reference is what the places were fitted on, as with one image, its deviations are rounding.
        deviations = reference[..., DEVIATION]
        place_term[DEVIATION] = self.place_weight * spread_ratio(distances, deviations, 1e-3 * DEVIATION_SCALE)

        whitened = depth - PLACE_NUMBERS
        normality = Normality(normal_prototypes, reference, distances, whitened)
        shots = _Cells(np.empty((0, *reference.shape[1:]), np.float32))
        if len(images.shots):
            shot_patches, shots_of_places = extract_features(
                features, images.shots, "features of defects", _metric_features, _place_features
            )
            shots = _embed(shot_patches, whitening, typical_length)
            _add_places(shots, place_scale, places, shots_of_places)
        weights = {"anomaly_weight": self.anomaly_weight, "direction_weight": self.direction_weight}
        of_shots = ShotPatches.of(shots.embeddings, normal_prototypes)
        labels = fit_label_terms(of_shots, normality, **weights, seed=seed)
        of_labels = labels(reference)
        direction = place_term + labels.direction
        place_direction = np.zeros(len(places.projection), np.float32)
        evidence = distances + reference @ place_term + of_labels
        top_cells = max(1, round(TOP_SHARE * distances[0].size))
        if len(images.shots):
            sites += [shots.site("shots", int(index)) for index in nearest_patch(labels.prototypes, shots.flat)]
        if len(images.shots) and self.steps:
            shot_evidence = nearest_distance(shots.embeddings, normal_prototypes) + shots.embeddings @ place_term
            shot_evidence += left_out_evidence(shots.embeddings, of_shots, normality, **weights, seed=seed)
            trained, gain = self._train(
                (reference, places.deviations(of_places[for_scale]), evidence - of_labels.mean()),
                (shots.embeddings, places.deviations(shots_of_places), shot_evidence),
                top_cells,
            )
            in_metric, place_direction = np.split(trained, [whitened])
            direction[:whitened] += in_metric
            # The network scales the number that belongs to it, so that it does not count in distances.
            direction[TRAINED] = 1.0 / DEVIATION_SCALE
            evidence += gain

        zero, unit = _zero_and_unit(evidence, top_cells)
        scoring = ScoringParameters(
            n_normal=len(normal_prototypes),
            top_cells=top_cells,
            softness=SOFTNESS,
            normal_scale=1.0 / unit,
            anomaly_scale=labels.weight / unit,
            bias=-zero / unit,
            kappa=self.kappa,
            offset=0.0,
        )
        prototypes = np.concatenate([normal_prototypes, labels.prototypes])
        network = MeliadNetwork(
            features.backbone,
            images.size_hw,
            depth=depth,
            place_directions=(places.main.shape[1], places.main.shape[2]),
            prototypes=len(prototypes),
            scoring=scoring,
        )
        network.typical_length.fill_(typical_length)  # type: ignore[operator]
        network.place_scale.copy_(torch.from_numpy(place_scale))  # type: ignore[operator]
        network.prototypes.data = torch.from_numpy(prototypes)
        network.direction.data = torch.from_numpy((direction / unit).astype(np.float32))
        load_metric(network, whitening)
        load_places(network, places, place_direction)
        facts = {"normal_prototypes": len(normal_prototypes), "anomaly_prototypes": len(sites) - len(normal_prototypes)}
        return FittedDetector(network.eval(), tuple(sites), facts)

    def _train(
        self, normal: _Images, shots: _Images, top_cells: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Train the direction on normal images and shots, in the unit of their evidence.

        Returns:
            The direction, float32 [whitened numbers + directions of places], and the evidence [n, h, w] that it brings
            the normal images: of each half by a direction trained on the other, for the training lowers what it sees.
        """
        scales = _training_scales(*normal[:2])
        zero, unit = _zero_and_unit(normal[2], top_cells)
        (cells, evidence), of_shots = (
            _bags(embeddings, deviations, scales, (evidence - zero) / unit)
            for embeddings, deviations, evidence in (normal, shots)
        )

        def train(start: int, step: int) -> NDArray[np.float32]:
            part = cells[start::step], evidence[start::step]
            return unit * train_direction(part, of_shots, top_cells=top_cells, steps=self.steps)

        trained = train(0, 1)
        gain = cells @ trained
        if len(cells) > 1:
            for half in (0, 1):
                gain[half::2] = cells[half::2] @ train(1 - half, 2)
        return trained * scales, gain.reshape(normal[2].shape)

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> MeliadNetwork:
        """Rebuild a fitted network from its tensors and the scalars of its scoring."""
        count, depth = state["prototypes"].shape
        network = MeliadNetwork(
            backbone,
            input_hw,
            depth=depth,
            place_directions=(state["place_main"].shape[1], state["place_main"].shape[2]),
            prototypes=count,
            scoring=ScoringParameters(**description),
        )
        network.load_state_dict(state)
        return network


def _metric_features(levels: Sequence[Tensor]) -> Tensor:
    return patch_features(levels[1:])


def _place_features(levels: Sequence[Tensor]) -> Tensor:
    return place_features(levels[:2])


def _embed(patches: NDArray[np.float32], whitening: Whitening, typical_length: float) -> _Cells:
    """Whiten and damp, image by image, in the memory of the patches; what places bring stays 0."""
    typical = torch.tensor(typical_length)
    whitened_depth = len(whitening.matrix)
    for image in patches:
        whitened = torch.from_numpy(whitening(image))
        length = torch.linalg.vector_norm(whitened, dim=-1, keepdim=True)
        image[..., :whitened_depth] = (whitened * length_damping(length, typical)).numpy()
        image[..., whitened_depth:] = 0.0
    return _Cells(patches[..., : whitened_depth + PLACE_NUMBERS])


def _add_places(
    cells: _Cells, place_scale: NDArray[np.float32], places: PlaceGaussians, of_places: NDArray[np.float32]
) -> None:
    """Scale embeddings as their places count, and put the deviation from what is normal there behind."""
    cells.embeddings[...] *= place_scale[..., None]
    cells.embeddings[..., DEVIATION] = DEVIATION_SCALE * places(of_places)


def _training_scales(embeddings: NDArray[np.float32], deviations: NDArray[np.float32]) -> NDArray[np.float32]:
    """Factors for what a direction is trained on: a spread of 1 for the metric's numbers, PLACE_SPREAD for places.

    Where the images are what the places were fitted on, as with one image, their deviations are rounding: 0.
    """
    spreads = [(embeddings[..., :DEVIATION], 1.0), (deviations, PLACE_SPREAD)]
    return np.concatenate(
        [
            np.full(numbers.shape[-1], wanted / spread if (spread := float(numbers.std())) > 1e-3 else 0.0, np.float32)
            for numbers, wanted in spreads
        ]
    )


def _bags(
    embeddings: NDArray[np.float32],
    deviations: NDArray[np.float32],
    scales: NDArray[np.float32],
    evidence: NDArray[Any],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a direction is trained on, [n, cells, ...], and evidence [n, cells], of images."""
    numbers = np.concatenate([embeddings[..., :DEVIATION], deviations], axis=-1)
    numbers *= scales
    count = len(numbers)
    return numbers.reshape(count, -1, len(scales)), evidence.reshape(count, -1).astype(np.float32)


def _zero_and_unit(evidence: NDArray[np.float32], top_cells: int) -> tuple[float, float]:
    """The evidence two standard deviations above the typical normal score, and one of them."""
    scores = -np.sort(-evidence.reshape(len(evidence), -1), axis=1)[:, :top_cells].mean(axis=1)
    # Of one or two images the scores have no spread to speak of; then that of the cells stands in.
    unit = max(float(scores.std()), 0.1 * float(evidence.std()), 1e-6)
    return float(scores.mean()) + 2.0 * unit, unit


def _place_scale(learned: NDArray[np.float32], reference: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """How much embeddings count at each place, [h, w] [ours].

    At a border, an edge or a seam normal images deviate more than elsewhere, and would raise alarms first; scaled by
    the inverse of their mean distance, all places deviate alike. With few images a place is taken for a typical one.

    Args:
        learned: Embeddings of the images that prototypes are taken from, [n, h, w, D].
        reference: Embeddings of other normal images, [m, h, w, D].
        seed: Of the prototypes.
    """
    distances = nearest_distance(reference, choose_prototypes(_Cells(learned).flat, NORMAL_PROTOTYPES, seed))
    count, typical = len(distances), float(distances.mean())
    of_place = (count * distances.mean(axis=0) + PLACE_PRIOR * typical) / (count + PLACE_PRIOR)
    return np.asarray(np.clip(typical / np.maximum(of_place, 1e-12), *PLACE_BOUNDS), dtype=np.float32)
