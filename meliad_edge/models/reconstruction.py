"""MeLIAD as far as it is public: class-specific embeddings, channel and patch entropy, joint training.

A reconstruction: the abstract of arXiv 2409.13602 names the parts, second-hand summaries give the margin loss, and
the entropy formula, the weights of the losses and every constant here are ours (docs/method.md marks each). The
default detector, ``meliad``, builds on these parts and is more accurate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from meliad_edge.errors import UsageError
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor, extract_patch_features, patch_features
from meliad_edge.models.network import (
    Detector,
    FittedDetector,
    FrozenBackboneNetwork,
    TrainingImages,
    no_prototypes,
    register,
)
from meliad_edge.models.scoring import entropy_evidence
from meliad_edge.progress import progress_bar

DEPTH = 128
EMBEDDINGS_PER_CLASS = 16
TOP_SHARE = 0.10
KAPPA_MAX = 0.9
MARGIN = 0.2
BOUNDARY = 1.2
_BATCH_PER_CLASS = 8
_LEARNING_RATE = 1e-3
_BOUNDARY_LEARNING_RATE = 5e-4


@dataclass(frozen=True, slots=True)
class _Scored:
    """What the head computes of a batch.

    Attributes:
        score: Image logit S, [N].
        evidence: e, [N, h, w].
        entropy_bits: H, [N, h, w], in [0, 1].
        pooled: L2-normalised mean embedding of each image, [N, D].
    """

    score: Tensor
    evidence: Tensor
    entropy_bits: Tensor
    pooled: Tensor


class EntropyHead(nn.Module):
    """Patch features to evidence: reduction, class-specific embeddings, entropy-weighted class maps.

    Args:
        channels: Channels of the patch features.
        cells: Cells of the grid.
        channel_entropy: Whether phi is trained; else it stays 0 and the channels are weighted by theta alone.
        patch_entropy: Whether kappa is trained; else it is 0 and no evidence is damped.
    """

    def __init__(self, channels: int, cells: int, *, channel_entropy: bool = True, patch_entropy: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.reduction = nn.Sequential(
            nn.Conv2d(channels, DEPTH, 1), nn.ReLU(), nn.BatchNorm2d(DEPTH),
            nn.Conv2d(DEPTH, DEPTH, 1), nn.ReLU(), nn.BatchNorm2d(DEPTH),
        )  # fmt: skip
        self.class_embeddings = nn.Conv2d(DEPTH, 2 * EMBEDDINGS_PER_CLASS, 1)  # normal first, then anomaly
        self.theta = nn.Parameter(torch.zeros(2, EMBEDDINGS_PER_CLASS))
        self.phi = nn.Parameter(torch.zeros(2, 1), requires_grad=channel_entropy)
        self.kappa_logit = nn.Parameter(torch.zeros(()), requires_grad=patch_entropy)
        self.kappa_max = KAPPA_MAX if patch_entropy else 0.0
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(()))
        self.cells = cells
        self.top_cells = max(1, round(TOP_SHARE * cells))

    @property
    def kappa(self) -> Tensor:
        """Strength of the damping, in (0, 0.9), or 0 without patch entropy."""
        return self.kappa_max * torch.sigmoid(self.kappa_logit)

    def forward(self, features: Tensor) -> _Scored:
        """Score patch features [N, C, h, w]."""
        count, _, height, width = features.shape
        standardised = (features - self.mean) * self.scale  # type: ignore[operator]
        embeddings = self.reduction(standardised)
        per_class = self.class_embeddings(embeddings).view(count, 2, EMBEDDINGS_PER_CLASS, height * width)
        weights = torch.softmax(self.theta + self.phi * (1.0 - self._channel_entropy(per_class)), dim=-1)
        normal_map, anomaly_map = (weights.unsqueeze(-1) * per_class).sum(2).unbind(1)  # [N, hw] each
        log_odds = (anomaly_map - normal_map) * torch.exp(-self.log_temperature)
        evidence = entropy_evidence(log_odds, self.kappa)
        probability = torch.sigmoid(log_odds)
        entropy_bits = (functional.softplus(log_odds) - log_odds * probability) / math.log(2.0)
        return _Scored(
            score=evidence.topk(self.top_cells, dim=-1).values.mean(-1) + self.offset,
            evidence=evidence.view(count, height, width),
            entropy_bits=entropy_bits.view(count, height, width),
            pooled=functional.normalize(embeddings.mean((2, 3)), dim=1),
        )

    def _channel_entropy(self, per_class: Tensor) -> Tensor:
        """How evenly each embedding spreads over the image, [N, 2, K] in [0, 1]."""
        log_q = torch.log_softmax(per_class, dim=-1)
        return -(log_q.exp() * log_q).sum(-1) / math.log(self.cells)


class ReconstructionNetwork(FrozenBackboneNetwork):
    """Backbone and entropy head; it has no prototypes to name."""

    def __init__(
        self,
        backbone: Backbone,
        input_hw: tuple[int, int],
        *,
        channel_entropy: bool = True,
        patch_entropy: bool = True,
    ) -> None:
        super().__init__(backbone, input_hw)
        self.switches = {"channel_entropy": channel_entropy, "patch_entropy": patch_entropy}
        self.head = EntropyHead(sum(backbone.channels), self.grid_hw[0] * self.grid_hw[1], **self.switches)

    @property
    def top_cells(self) -> int:
        """Cells of the map whose mean is the score."""
        return self.head.top_cells

    @property
    def score_offset(self) -> float:
        """Constant b0 added to that mean."""
        return self.head.offset.item()

    def describe(self) -> dict[str, Any]:
        """Which parts of the entropy are on."""
        return dict(self.switches)

    def score_levels(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Score feature maps of strides 16 and 32."""
        scored = self.head(patch_features(levels))
        return scored.score, scored.evidence, no_prototypes(scored.evidence)


@register("meliad-reconstruction")
@dataclass(frozen=True, slots=True)
class MeliadReconstruction(Detector):
    """Trains the head on frozen features: score and metric under one loss, without augmentation.

    Attributes:
        channel_entropy: Weigh channels by the entropy of their spread over the image (phi).
        patch_entropy: Damp the evidence of cells by their entropy (kappa).
        margin_weight: Weight of the margin loss, lambda_m.
        entropy_weight: Weight of the entropy in the loss, lambda_H.
        steps: Of training.
    """

    channel_entropy: bool = True
    patch_entropy: bool = True
    margin_weight: Annotated[float, Field(ge=0.0)] = 1.0
    entropy_weight: Annotated[float, Field(ge=0.0)] = 0.1
    steps: Annotated[int, Field(ge=1)] = 300

    strides: ClassVar[tuple[int, ...]] = (16, 32)

    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Fit on normal images and at least one labelled anomaly.

        Raises:
            UsageError: No labelled anomaly.
        """
        if not len(images.shots):
            msg = "meliad-reconstruction learns from labelled defects and got none; use --shots 1 or --detector meliad"
            raise UsageError(msg)
        normal = _channels_first(extract_patch_features(features, images.normal, "features of normals"))
        shots = _channels_first(extract_patch_features(features, images.shots, "features of defects"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ReconstructionNetwork(
                features.backbone,
                images.size_hw,
                channel_entropy=self.channel_entropy,
                patch_entropy=self.patch_entropy,
            )
            head = network.head
            head.mean.copy_(normal.mean((0, 2, 3)).view(-1, 1, 1))  # type: ignore[operator]
            head.scale.copy_(1.0 / (normal.std((0, 2, 3)).view(-1, 1, 1) + 1e-6))  # type: ignore[operator]
            loss = self._train(head, normal, shots)
        facts = {"training_steps": self.steps, "final_loss": round(loss, 4), "kappa": round(head.kappa.item(), 4)}
        return FittedDetector(network.eval(), (), facts)

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> ReconstructionNetwork:
        """Rebuild a fitted network from its tensors."""
        network = ReconstructionNetwork(backbone, input_hw, **description)
        network.load_state_dict(state)
        return network

    def _train(self, head: EntropyHead, normal: Tensor, shots: Tensor) -> float:
        boundary = nn.Parameter(torch.tensor(BOUNDARY))
        optimiser = torch.optim.Adam(
            [
                {"params": head.parameters(), "lr": _LEARNING_RATE, "weight_decay": 1e-4},
                {"params": [boundary], "lr": _BOUNDARY_LEARNING_RATE},
            ]
        )
        labels = torch.tensor([0] * _BATCH_PER_CLASS + [1] * _BATCH_PER_CLASS)
        head.train()
        loss = torch.zeros(())
        with progress_bar() as bar:
            task = bar.add_task(f"{'training':<24}", total=self.steps, note="")
            for _ in range(self.steps):
                picked_normal = torch.randint(len(normal), (_BATCH_PER_CLASS,))
                picked_shots = torch.randint(len(shots), (_BATCH_PER_CLASS,))
                scored: _Scored = head(torch.cat([normal[picked_normal], shots[picked_shots]]))
                image_ids = torch.cat([picked_normal, len(normal) + picked_shots])
                loss = (
                    functional.binary_cross_entropy_with_logits(scored.score, labels.float())
                    + self.margin_weight * margin_loss(scored.pooled, labels, image_ids, boundary)
                    + self.entropy_weight * _uncertainty(scored, labels, head.top_cells)
                )
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                bar.update(task, advance=1, note=f"loss {loss.item():.3f}")
        head.eval()
        return loss.item()


def margin_loss(pooled: Tensor, labels: Tensor, image_ids: Tensor, boundary: Tensor) -> Tensor:
    """Margin loss of Wu et al. (2017): max(0, mu + y (d - beta)), y = +1 for a pair of one class, -1 for others.

    Pairs of one image with itself are left out; the mean runs over the non-empty groups normal-normal,
    anomaly-anomaly and normal-anomaly, so that the few anomalies weigh as much as the normals.

    Args:
        pooled: L2-normalised embeddings, [N, D].
        labels: 0 for normal, 1 for anomalous, [N].
        image_ids: Equal for repetitions of one image, [N].
        boundary: beta, a scalar that is learned.
    """
    squared = (pooled.unsqueeze(1) - pooled.unsqueeze(0)).square().sum(-1)
    distances = (squared + 1e-12).sqrt()
    same_class = labels.unsqueeze(1) == labels.unsqueeze(0)
    sign = torch.where(same_class, 1.0, -1.0)
    losses = functional.relu(MARGIN + sign * (distances - boundary))
    is_pair = torch.triu(image_ids.unsqueeze(1) != image_ids.unsqueeze(0), diagonal=1)
    group_of_pair = labels.unsqueeze(1) + labels.unsqueeze(0)  # 0 normal-normal, 1 mixed, 2 anomaly-anomaly
    groups = [losses[is_pair & (group_of_pair == group)] for group in range(3)]
    return torch.stack([group.mean() for group in groups if len(group)]).mean()


def _uncertainty(scored: _Scored, labels: Tensor, top_cells: int) -> Tensor:
    """Mean entropy of all cells of a normal image, and of the top cells of an anomalous one."""
    entropy = scored.entropy_bits.flatten(1)
    top = scored.evidence.flatten(1).topk(top_cells, dim=1).indices
    return torch.where(labels == 0, entropy.mean(1), entropy.gather(1, top).mean(1)).mean()


def _channels_first(features: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(features).permute(0, 3, 1, 2)
