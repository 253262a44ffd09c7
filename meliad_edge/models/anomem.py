"""AnoMem: how far the patches of an image are from what multi-scale memories of normality retrieve (arXiv 2211.09041).

A reconstruction of Jezequel et al. We know second-hand that the encoder and one Hopfield memory per scale are trained
together with a memory-augmented NT-Xent loss and a variance term, and that the score weighs the deviations |z - HF(z)|
of all scales, by a small classifier where there are labels. Ours is everything else: the frozen pretrained backbone
under one trainable 1x1 projection per scale, the start from whitening and k-means, the views, all constants, the
standardised map on one grid, and the form of the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor, pooled_levels, upsample_to
from meliad_edge.models.hopfield import HopfieldMemory
from meliad_edge.models.network import (
    Detector,
    FittedDetector,
    FrozenBackboneNetwork,
    TrainingImages,
    no_prototypes,
    register,
)
from meliad_edge.models.prototypes import choose_prototypes
from meliad_edge.models.whitening import Whitening, fit_whitening
from meliad_edge.progress import progress_bar, track

TOP_SHARE = 0.05
TEMPERATURE = 0.5
# Learning rate of the projections, which start from whitening, in units of that of the memories.
PROJECTION_SHARE = 0.1
_PAIRS = 128
_VIEWED_IMAGES = 200
_MEMORY_IMAGES = 500
# Normal images that nothing else is fitted on, for the usual deviations.
_SCALE_IMAGES = 200
_BATCH = 16
_CLASSIFIER_STEPS = 500

Floats = NDArray[np.float32]
Frames = NDArray[np.uint8]


class AnoMemNetwork(FrozenBackboneNetwork):
    """Per scale a projection, a memory and the usual deviations of normal cells; a weight for each scale.

    The map is the weighted sum over scales of (Delta - mean) / std, on the grid of the finest scale; the score is the
    mean of its top cells.

    Args:
        backbone: With one stride per scale.
        input_hw: Size of the frames in pixels.
        prototypes: Rows of the memory of each scale.
        beta: Inverse temperature of the memories.
    """

    deviation_mean: Tensor
    deviation_std: Tensor
    scale_weights: Tensor

    def __init__(self, backbone: Backbone, input_hw: tuple[int, int], prototypes: Sequence[int], beta: float) -> None:
        super().__init__(backbone, input_hw)
        # A linear layer on every cell is the 1x1 convolution.
        self.projections = nn.ModuleList(nn.Linear(channels, channels) for channels in backbone.channels)
        self.memories = nn.ModuleList(
            HopfieldMemory(count, channels, beta) for count, channels in zip(prototypes, backbone.channels, strict=True)
        )
        scales = len(backbone.channels)
        self.register_buffer("deviation_mean", torch.zeros(scales))
        self.register_buffer("deviation_std", torch.ones(scales))
        self.register_buffer("scale_weights", torch.full((scales,), 1.0 / scales))
        self.description = {"prototypes": list(prototypes), "beta": beta}

    def load_scale(self, scale: int, whitening: Whitening, patterns: Floats) -> None:
        """Let one scale project as a whitening does and remember patterns [K, C]."""
        projection: nn.Linear = self.projections[scale]  # type: ignore[assignment]
        memory: HopfieldMemory = self.memories[scale]  # type: ignore[assignment]
        projection.weight.data = torch.from_numpy(whitening.matrix)
        projection.bias.data = torch.from_numpy(-(whitening.matrix @ whitening.mean))
        memory.patterns.data = torch.from_numpy(patterns)

    @property
    def top_cells(self) -> int:
        """Cells of the map whose mean is the score."""
        return max(1, round(TOP_SHARE * self.grid_hw[0] * self.grid_hw[1]))

    def describe(self) -> dict[str, Any]:
        """Sizes and inverse temperature of the memories."""
        return dict(self.description)

    def embed(self, scale: int, patches: Tensor) -> Tensor:
        """Pooled features [..., C] of one scale to embeddings z of length 1, [..., C]."""
        return functional.normalize(self.projections[scale](patches), dim=-1)

    def retrieve(self, scale: int, embeddings: Tensor) -> Tensor:
        """HF(z) of one scale, [..., C]."""
        retrieved: Tensor = self.memories[scale](embeddings)
        return retrieved

    def deviation(self, scale: int, patches: Tensor) -> Tensor:
        """Delta = |z - HF(z)| for pooled features [..., C] of one scale, [...]."""
        embeddings = self.embed(scale, patches)
        return ((embeddings - self.retrieve(scale, embeddings)).square().sum(-1) + 1e-12).sqrt()

    def standardised_maps(self, deviations: Sequence[Tensor]) -> Tensor:
        """(Delta_s - mean_s) / std_s of maps [N, h_s, w_s], on the finest grid: [N, scales, h, w]."""
        maps = [
            ((map_ - mean) / std).unsqueeze(1)
            for map_, mean, std in zip(deviations, self.deviation_mean, self.deviation_std, strict=True)
        ]
        return torch.cat([maps[0], *(upsample_to(coarse, maps[0]) for coarse in maps[1:])], dim=1)

    def score_levels(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Score feature maps, finest first."""
        pooled = [level.permute(0, 2, 3, 1) for level in pooled_levels(levels)]
        maps = self.standardised_maps([self.deviation(scale, patches) for scale, patches in enumerate(pooled)])
        evidence = (self.scale_weights.view(1, -1, 1, 1) * maps).sum(1)
        return mean_of_top(evidence, self.top_cells), evidence, no_prototypes(evidence)


def mean_of_top(maps: Tensor, count: int) -> Tensor:
    """Mean of the largest cells of each map: [..., h, w] to [...]."""
    return maps.flatten(-2).topk(count, dim=-1).values.mean(-1)


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al., arXiv 2002.05709) of N pairs: each of the 2N vectors must find its partner by cosine.

    -log(exp(cos(a, b) / t) / sum over all c other than a of exp(cos(a, c) / t)), averaged over the 2N vectors a.

    Args:
        first: [N, D].
        second: The partners, [N, D].
        temperature: t.
    """
    vectors = functional.normalize(torch.cat([first, second]), dim=-1)
    itself = torch.eye(len(vectors), dtype=torch.bool)
    similarity = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf)
    partners = torch.arange(len(vectors)).roll(len(first))
    return functional.cross_entropy(similarity, partners)


def variance_loss(prototypes: Tensor) -> Tensor:
    """Keeps the rows [K, D] of a memory apart: mean over dimensions of max(0, 1 - sqrt(D) std) [form: ours].

    1 / sqrt(D) is the standard deviation of each coordinate where vectors of length 1 point everywhere.
    """
    std = (prototypes.var(0, correction=0) + 1e-8).sqrt()
    return functional.relu(1.0 - prototypes.shape[1] ** 0.5 * std).mean()


def fit_scale_weights(normal: Tensor, anomalous: Tensor, prior: Tensor) -> Tensor:
    """The small classifier on deviations: a logistic one with weights >= 0, pulled towards those without labels [ours].

    Both classes count the same. The pull is as strong as the evidence of one labelled image, so that a single shot
    moves the weights little.

    Args:
        normal: Top-cell mean of each scale's standardised map, [n, scales].
        anomalous: The same of labelled anomalies, [m, scales].
        prior: Weights without labels, [scales], adding up to 1.

    Returns:
        Weights of the scales, [scales], not negative, adding up to 1.
    """
    weights, bias = prior.clone().requires_grad_(), torch.zeros((), requires_grad=True)
    centre = normal.mean(0)
    optimiser = torch.optim.Adam([weights, bias], lr=0.02)
    for _ in range(_CLASSIFIER_STEPS):
        loss = (
            functional.softplus((normal - centre) @ weights + bias).mean()
            + functional.softplus(-((anomalous - centre) @ weights + bias)).mean()
            + (weights - prior).square().sum() / len(anomalous)
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            weights.clamp_(min=0.0)
    found = weights.detach()
    return found / found.sum() if found.sum() > 0 else prior


@register("anomem")
@dataclass(frozen=True, slots=True)
class AnoMem(Detector):
    """Trains projections and memories on normal images, and weighs the scales by labelled anomalies if there are any.

    The contrastive training is kept because the method consists of it, not because it helps here: on ELPV (256 px,
    seed 0, no labels) image AUROC is 0.900 with it and 0.906 with ``steps`` = 0.

    Attributes:
        prototypes: Rows of each memory, at most.
        beta: Inverse temperature of the memories.
        steps: Of the contrastive training; 0 keeps whitening and k-means.
        learning_rate: Of Adam, for the memories.
        variance_weight: Weight of the variance term.
    """

    prototypes: Annotated[int, Field(ge=1)] = 512
    beta: Annotated[float, Field(gt=0.0)] = 5.0
    steps: Annotated[int, Field(ge=0)] = 300
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    variance_weight: Annotated[float, Field(ge=0.0)] = 1.0

    strides: ClassVar[tuple[int, ...]] = (16, 32)

    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Fit on normal images and any number of labelled anomalies, none included."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(images.normal))
        # What is usual is honest only on images that nothing was fitted on.
        usual_count = min(_SCALE_IMAGES, max(1, len(order) // 5))
        usual_images, memory_images = order[:usual_count], order[usual_count:][:_MEMORY_IMAGES]
        if not len(memory_images):
            memory_images = usual_images
        stored = _pooled_patches(features, images.normal[memory_images], "features of normals")
        usual = _pooled_patches(features, images.normal[usual_images], "features of normals")
        shots = _pooled_patches(features, images.shots, "features of defects")

        starts = [_whiten_and_memorise(level, self.prototypes, seed) for level in stored]
        network = AnoMemNetwork(
            features.backbone,
            images.size_hw,
            [len(patterns) for _, patterns in starts],
            self.beta,
        )
        for scale, (whitening, patterns) in enumerate(starts):
            network.load_scale(scale, whitening, patterns)
        loss = self._train(network, stored, _views(features, images.normal[memory_images[:_VIEWED_IMAGES]]), rng)
        network.eval()
        with torch.inference_mode():
            usual_tops = _standardise(network, usual)
            shot_tops = mean_of_top(network.standardised_maps(_deviations(network, shots)), network.top_cells)
        if len(shot_tops):
            prior = network.scale_weights.clone()
            network.scale_weights = fit_scale_weights(usual_tops.clone(), shot_tops.clone(), prior)
        facts = {
            "training_steps": self.steps,
            "final_loss": round(loss, 4),
            "scale_weights": [round(float(weight), 4) for weight in network.scale_weights],
        }
        return FittedDetector(network, (), facts)

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> AnoMemNetwork:
        """Rebuild a fitted network from its tensors and the sizes of its memories."""
        network = AnoMemNetwork(backbone, input_hw, **description)
        network.load_state_dict(state)
        return network

    def _train(
        self,
        network: AnoMemNetwork,
        images: Sequence[Floats],
        views: Sequence[Sequence[Floats]],
        rng: np.random.Generator,
    ) -> float:
        """Stage 1: projections and memories under one loss, the mean over scales; returns its last value."""
        optimiser = torch.optim.Adam(
            [
                {"params": network.memories.parameters(), "lr": self.learning_rate},
                {"params": network.projections.parameters(), "lr": PROJECTION_SHARE * self.learning_rate},
            ]
        )
        loss = torch.zeros(())
        with progress_bar() as bar:
            task = bar.add_task(f"{'training':<24}", total=self.steps, note="")
            for step in range(self.steps):
                view = views[step % len(views)]
                losses = []
                for scale in range(len(images)):
                    count, height, width, _ = view[scale].shape
                    image = rng.permutation(count)[:_PAIRS]
                    row, column = rng.integers(height, size=len(image)), rng.integers(width, size=len(image))
                    first, second = (torch.from_numpy(level[scale][image, row, column]) for level in (images, view))
                    losses.append(self._loss(network, scale, first, second))
                loss = torch.stack(losses).mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                # The loss compares directions only; rows that grew would make retrieval ever harder.
                with torch.no_grad():
                    for patterns in network.memories.parameters():
                        patterns.copy_(functional.normalize(patterns, dim=-1))
                bar.update(task, advance=1, note=f"loss {loss.item():.3f}")
        return loss.item()

    def _loss(self, network: AnoMemNetwork, scale: int, first: Tensor, second: Tensor) -> Tensor:
        """Memory-augmented NT-Xent: what the memory retrieves for one view must match the other view [form: ours]."""
        embedded, other = network.embed(scale, first), network.embed(scale, second)
        contrast = nt_xent(embedded, network.retrieve(scale, other), TEMPERATURE)
        contrast = contrast + nt_xent(other, network.retrieve(scale, embedded), TEMPERATURE)
        memory: HopfieldMemory = network.memories[scale]  # type: ignore[assignment]
        return 0.5 * contrast + self.variance_weight * variance_loss(memory.patterns)


def _pooled_patches(features: FeatureExtractor, frames: Frames, description: str) -> list[Floats]:
    """Pooled features of frames, one [n, h, w, C] per scale."""
    strides, channels = features.backbone.strides, features.backbone.channels
    result = [
        np.empty((len(frames), frames.shape[1] // stride, frames.shape[2] // stride, depth), np.float32)
        for stride, depth in zip(strides, channels, strict=True)
    ]
    for start in track(range(0, len(frames), _BATCH), description):
        levels = features.levels_of_batch(frames[start : start + _BATCH])
        for patches, level in zip(result, pooled_levels([torch.from_numpy(level) for level in levels]), strict=True):
            patches[start : start + len(level)] = level.permute(0, 2, 3, 1).numpy()
    return result


def _views(features: FeatureExtractor, frames: Frames) -> list[list[Floats]]:
    """Features of mirrored and of quarter-turned images, each cell moved back to where it was in the image."""
    mirrored = _pooled_patches(features, np.ascontiguousarray(frames[:, :, ::-1]), "features of views")
    turned = _pooled_patches(features, np.ascontiguousarray(np.rot90(frames, 1, (1, 2))), "features of views")
    return [[level[:, :, ::-1] for level in mirrored], [np.rot90(level, -1, (1, 2)) for level in turned]]


def _whiten_and_memorise(level: Floats, count: int, seed: int) -> tuple[Whitening, Floats]:
    """Where training starts: the whitening of patches [n, h, w, C], and centres of k-means, of length 1, as memory."""
    # On a small grid neighbouring cells are averages over the same cells.
    patches = np.unique(level.reshape(-1, level.shape[-1]), axis=0)
    whitening = fit_whitening(patches)
    centres = choose_prototypes(_unit_length(whitening(patches)), count, seed)
    return whitening, _unit_length(centres)


def _unit_length(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), np.float32)


def _deviations(network: AnoMemNetwork, patches: Sequence[Floats]) -> list[Tensor]:
    """Deviation maps, one [n, h, w] per scale."""
    result = []
    for scale, level in enumerate(patches):
        batches = torch.split(torch.from_numpy(level), _BATCH)
        result.append(torch.cat([network.deviation(scale, batch) for batch in batches]))
    return result


def _standardise(network: AnoMemNetwork, patches: Sequence[Floats]) -> Tensor:
    """Take mean and spread of the deviations from normal images; returns their top-cell means in that unit, [n, S]."""
    deviations = _deviations(network, patches)
    network.deviation_mean.copy_(torch.stack([map_.mean() for map_ in deviations]))
    network.deviation_std.copy_(torch.stack([map_.std().clamp_min(1e-6) for map_ in deviations]))
    return mean_of_top(network.standardised_maps(deviations), network.top_cells)
