"""MeLIAD: metric learning and entropy-based scoring [ours, after arXiv 2409.13602].

What the paper's abstract states is kept: a learned metric over patch embeddings, class-specific embeddings,
an entropy-based score that is interpretable by design, learned from a few anomalies without augmentation.
The prototypes of both classes are our extension; docs/method.md says which part comes from where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import (
    FeatureExtractor,
    extract_features,
    interpolation_matrix,
    patch_features,
    pooled_levels,
)
from meliad_edge.models.label_terms import (
    ANOMALY_WEIGHT,
    DIRECTION_WEIGHT,
    Normality,
    fit_label_terms,
    left_out_evidence,
    spread_ratio,
)
from meliad_edge.models.network import Detector, FittedDetector, PatchSite, PrototypeNetwork, TrainingImages, register
from meliad_edge.models.places import PlaceGaussians, fit_places, place_deviation, place_features
from meliad_edge.models.prototypes import choose_prototypes, nearest_distance, nearest_patch
from meliad_edge.models.scoring import ScoringParameters
from meliad_edge.models.trained_direction import train_direction
from meliad_edge.models.whitening import Whitening, fit_whitening

# An embedding: whitened directions of largest variance, two numbers on the deviation from what is normal at a place,
# and zeros up to a multiple of 8. Vector units, here and on a GPU, like multiples of 8 and 16.
WHITENED = 320
_PLACE_NUMBERS = 8
# Where the deviation is in an embedding, and what the training made of it.
_DEVIATION = -_PLACE_NUMBERS
_TRAINED = _DEVIATION + 1
NORMAL_PROTOTYPES = 512
# Length of an embedding after normalisation: its whitened length to the power 1 - LENGTH_DAMPING.
LENGTH_DAMPING = 0.75
# How far places where normal images deviate more, or less, than elsewhere are evened out.
PLACE_BOUNDS = (0.5, 2.0)
# Images that a place's own deviation must be worth to count as much as that of all places.
PLACE_PRIOR = 20
# Weight of the deviation from what is normal at a place: its spread over normal cells, in spreads of normal distances.
PLACE_WEIGHT = 1.25
# Spread of deviations from what is normal at a place in the training of the direction; that of the others is 1.
PLACE_SPREAD = 2.0
# What places say are two numbers of an embedding; so scaled, they do not count in distances to prototypes.
DEVIATION_SCALE = 0.01
TOP_SHARE = 0.025
SOFTNESS = 0.01
KAPPA = 0.5
# Of the training of the direction.
STEPS = 100
# Normal training images that the spread and the scale of the evidence are estimated on.
_SCALE_IMAGES = 200
_PROTOTYPE_IMAGES = 500
_SHORTEST = 0.05


class MeliadNetwork(PrototypeNetwork):
    """Backbone, learned metric, Gaussians of places, prototypes and direction.

    The metric is two 1x1 convolutions, one per feature level. They are applied before the levels are averaged and the
    coarse one is upsampled: exact, because both are linear, and cheaper; in INT8 they read what the backbone wrote.

    An embedding ends with how far, and how far in a trained direction, the patch deviates from what is normal at its
    place. The direction of the anomaly class brings both into the evidence, as it does with what the labels say.

    Args:
        backbone: Of strides 8, 16 and 32.
        input_hw: Height and width of frames.
        depth: Numbers of an embedding.
        place_directions: Directions of the Gaussians of places, and how many of them are main ones.
        prototypes: Of both classes.
        scoring: Scalars.
    """

    def __init__(
        self,
        backbone: Backbone,
        input_hw: tuple[int, int],
        *,
        depth: int,
        place_directions: tuple[int, int],
        prototypes: int,
        scoring: ScoringParameters,
    ) -> None:
        super().__init__(backbone, input_hw)
        finer, fine, coarse = backbone.channels
        self.metric_fine = nn.Conv2d(fine, depth - _PLACE_NUMBERS, 1)
        self.metric_coarse = nn.Conv2d(coarse, depth - _PLACE_NUMBERS, 1, bias=False)
        directions, main = place_directions
        # Averages 2 x 2 cells in passing.
        self.place_finer = nn.Conv2d(finer, directions, 2, stride=2, bias=False)
        self.place_fine = nn.Conv2d(fine, directions, 1, bias=False)
        self.place_mean = nn.Parameter(torch.zeros(directions, *self.grid_hw))
        self.place_main = nn.Parameter(torch.zeros(math.prod(self.grid_hw), directions, main))
        self.place_precision = nn.Parameter(torch.zeros(math.prod(self.grid_hw)))
        self.place_direction = nn.Parameter(torch.zeros(1, directions))
        # Bilinear interpolation as two products, which ONNX Runtime computes more than twice as fast as a resize.
        rows, columns = (interpolation_matrix(side // 2, side) for side in self.grid_hw)
        self.register_buffer("upsample_rows", rows, persistent=False)
        self.register_buffer("upsample_columns", columns.T.contiguous(), persistent=False)
        self.register_buffer("typical_length", torch.ones(()))
        self.register_buffer("place_scale", torch.ones(self.grid_hw))
        self.prototypes = nn.Parameter(torch.zeros(prototypes, depth))
        self.direction = nn.Parameter(torch.zeros(depth))
        self.scoring = scoring

    @property
    def grid_hw(self) -> tuple[int, int]:
        """One cell for every 16 x 16 pixels."""
        stride = self.backbone.strides[1]
        return self.input_hw[0] // stride, self.input_hw[1] // stride

    def embed(self, levels: tuple[Tensor, ...]) -> Tensor:
        """Feature maps of strides 8, 16 and 32 to patch embeddings [N, D, H/16, W/16]."""
        finer, fine, coarse = levels
        deviations = (self.place_fine(fine) - self.place_mean) + self.place_finer(finer)
        trained = (self.place_direction @ deviations.flatten(2)).view(-1, 1, *self.grid_hw)
        zeros_behind = (0, 0, 0, 0, 0, _PLACE_NUMBERS - 2)
        how_far = DEVIATION_SCALE * self._place_deviation(deviations)
        return torch.cat([self._whitened(fine, coarse), how_far, functional.pad(trained, zeros_behind)], dim=1)

    def _whitened(self, fine: Tensor, coarse: Tensor) -> Tensor:
        fine, coarse = pooled_levels((self.metric_fine(fine), self.metric_coarse(coarse)))
        upsample_rows: Tensor = self.upsample_rows  # type: ignore[assignment]
        upsample_columns: Tensor = self.upsample_columns  # type: ignore[assignment]
        whitened = fine + upsample_rows @ coarse @ upsample_columns
        typical_length: Tensor = self.typical_length  # type: ignore[assignment]
        place_scale: Tensor = self.place_scale  # type: ignore[assignment]
        # A product with ones: ONNX Runtime multiplies matrices several times faster than it adds over channels.
        squares = (whitened * whitened).flatten(2)
        length = (squares.new_ones(1, squares.shape[1]) @ squares).sqrt().view(-1, 1, *self.grid_hw)
        return whitened * (length_damping(length, typical_length) * place_scale)

    def _place_deviation(self, deviations: Tensor) -> Tensor:
        by_place = deviations.flatten(2).permute(2, 0, 1)
        return place_deviation(by_place, self.place_main, self.place_precision).T.reshape(-1, 1, *self.grid_hw)


def length_damping(length: Tensor, typical_length: Tensor) -> Tensor:
    """Factors that pull the lengths of embeddings together, so that direction counts more than contrast [ours].

    z -> z (|z| / typical length)^-0.75, between whitened (exponent 0) and cosine (exponent -1) embeddings.
    """
    return (length / typical_length).clamp_min(_SHORTEST).pow(-LENGTH_DAMPING)


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
        steps: Of the training of the direction; with 0 it is the difference of the means only.
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
            min(WHITENED, channels - _PLACE_NUMBERS)
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
        of_place = np.zeros(depth, np.float32)
        place_direction = np.zeros(len(places.projection), np.float32)
        reference_deviations = places.deviations(of_places[for_scale])
        # Where the reference is what the places were fitted on, as with one image, its deviations are rounding.
        deviations = reference[..., _DEVIATION]
        of_place[_DEVIATION] = self.place_weight * spread_ratio(distances, deviations, 1e-3 * DEVIATION_SCALE)

        normality = Normality(normal_prototypes, reference, distances, depth - _PLACE_NUMBERS)
        shots = _Cells(np.empty((0, *reference.shape[1:]), np.float32))
        if len(images.shots):
            patches, of_places = extract_features(
                features, images.shots, "features of defects", _metric_features, _place_features
            )
            shots = _embed(patches, whitening, typical_length)
            _add_places(shots, place_scale, places, of_places)
        weights = {"anomaly_weight": self.anomaly_weight, "direction_weight": self.direction_weight}
        labels = fit_label_terms(shots.embeddings, normality, **weights, seed=seed)
        direction = of_place + labels.direction
        evidence = distances + reference @ of_place + labels(reference)
        top_cells = max(1, round(TOP_SHARE * distances[0].size))
        if len(images.shots):
            sites += [shots.site("shots", int(index)) for index in nearest_patch(labels.prototypes, shots.flat)]
            shot_evidence = nearest_distance(shots.embeddings, normal_prototypes) + shots.embeddings @ of_place
            shot_evidence += left_out_evidence(shots.embeddings, normality, **weights, seed=seed)
            scales = _training_scales(reference, reference_deviations)
            zero, unit = _zero_and_unit(evidence, top_cells)
            trained = unit * train_direction(
                _bags(reference, reference_deviations, scales, (evidence - zero) / unit),
                _bags(shots.embeddings, places.deviations(of_places), scales, (shot_evidence - zero) / unit),
                top_cells=top_cells,
                steps=self.steps,
            )
            in_metric, place_direction = np.split(trained * scales, [depth - _PLACE_NUMBERS])
            direction[:_DEVIATION] += in_metric
            direction[_TRAINED] = 1.0 / DEVIATION_SCALE
            evidence += reference[..., :_DEVIATION] @ in_metric + reference_deviations @ place_direction

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
        _load_metric(network, whitening)
        _load_places(network, places)
        network.place_direction.data = DEVIATION_SCALE * torch.from_numpy(place_direction).unsqueeze(0)
        facts = {"normal_prototypes": len(normal_prototypes), "anomaly_prototypes": len(sites) - len(normal_prototypes)}
        return FittedDetector(network.eval(), tuple(sites), facts)

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
    return _Cells(patches[..., : whitened_depth + _PLACE_NUMBERS])


def _add_places(
    cells: _Cells, place_scale: NDArray[np.float32], places: PlaceGaussians, of_places: NDArray[np.float32]
) -> None:
    """Scale embeddings as their places count, and put the deviation from what is normal there behind."""
    cells.embeddings[...] *= place_scale[..., None]
    cells.embeddings[..., _DEVIATION] = DEVIATION_SCALE * places(of_places)


def _training_scales(embeddings: NDArray[np.float32], deviations: NDArray[np.float32]) -> NDArray[np.float32]:
    """Factors for what a direction is trained on: the metric's numbers get a spread of 1, those of places the other.

    Where the images are what the places were fitted on, as with one image, their deviations are rounding: 0.
    """
    spreads = [(embeddings[..., :_DEVIATION], 1.0), (deviations, PLACE_SPREAD)]
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
    numbers = np.concatenate([embeddings[..., :_DEVIATION], deviations], axis=-1)
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


def _load_metric(network: MeliadNetwork, whitening: Whitening) -> None:
    """Split the whitening between the two feature levels; the constant goes to the fine one."""
    fine = network.metric_fine.in_channels
    matrix = torch.from_numpy(whitening.matrix)
    network.metric_fine.weight.data = matrix[:, :fine, None, None].contiguous()
    network.metric_coarse.weight.data = matrix[:, fine:, None, None].contiguous()
    network.metric_fine.bias.data = torch.from_numpy(-(whitening.matrix @ whitening.mean))  # type: ignore[union-attr]


def _load_places(network: MeliadNetwork, places: PlaceGaussians) -> None:
    """Split the projection between the two feature levels."""
    finer = network.place_finer.in_channels
    projection = torch.from_numpy(places.projection)[:, :, None, None]
    network.place_finer.weight.data = projection[:, :finer].expand(-1, -1, 2, 2) / 4.0
    network.place_fine.weight.data = projection[:, finer:].contiguous()
    network.place_mean.data = torch.from_numpy(places.mean).permute(2, 0, 1).contiguous()
    network.place_main.data = torch.from_numpy(places.main)
    network.place_precision.data = torch.from_numpy(places.precision)
