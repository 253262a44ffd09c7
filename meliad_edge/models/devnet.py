"""DevNet and FLOS: a fine-tuned backbone that scores every location of an image at two scales, from a few labels.

DevNet (Pang et al., "Explainable Deep Few-shot Anomaly Detection with Deviation Networks", arXiv 2108.00462): a 1x1
convolution scores each location, the image score is the mean of the largest absolute scores, over two scales, and the
deviation loss pulls normals to the mean of a Gaussian prior and pushes anomalies five standard deviations above it.
Network, loss and optimisation follow the authors' code. FLOS is the baseline of the same comparison: the focal loss
on the same score.

The authors train ResNet-18 at 448 x 448 for 1000 steps of 24 + 24 images on a GPU. Ours: any supported backbone and
image size, and by default 160 steps of 8 + 8 images at five times their learning rate, which two CPU cores do in
minutes; at their rate so few steps leave the training loss high. Batch normalisation is in training mode while
fitting, as in the authors' code, and its running statistics mix both scales and both classes, as theirs do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from meliad_edge.errors import UsageError
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor, upsample_to
from meliad_edge.models.network import (
    Detector,
    DetectorNetwork,
    FittedDetector,
    TrainingImages,
    no_prototypes,
    register,
)
from meliad_edge.progress import progress_bar

STRIDE = 32
TOP_SHARE = 0.1
REFERENCE_SCORES = 5000
CONFIDENCE_MARGIN = 5.0
FOCUSING = 2.0
_WEIGHT_DECAY = 1e-5
_GRADIENT_NORM = 1.0
# Share of the steps at the full learning rate, the rest at a tenth of it. Ours: the authors divide by ten after each
# fifth of 1000 steps, so they learn in the first two fifths and hardly at all in the others.
_FULL_RATE_SHARE = 0.8
_EXPLANATION_PERCENTILE = 99.0
_EXPLANATION_SIGMA = 4.0


class DevNetNetwork(DetectorNetwork):
    """A backbone of its own and the location scorer; the score is not negative and has no prototypes to name.

    Args:
        backbone: With one level, of stride 32; it is trained, so it must not be shared.
        input_hw: Height and width of the frames in pixels, multiples of 32 and at least 64.
    """

    def __init__(self, backbone: Backbone, input_hw: tuple[int, int]) -> None:
        super().__init__(input_hw)
        self.backbone = backbone
        self.location_scorer = nn.Conv2d(backbone.channels[0], 1, 1)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """The grid of the full scale."""
        return self.input_hw[0] // STRIDE, self.input_hw[1] // STRIDE

    @property
    def top_cells(self) -> None:
        """None: the score is the mean of two top-K means, each over the grid of its own scale."""

    def describe(self) -> dict[str, Any]:
        """Nothing: the tensors say it all."""
        return {}

    def location_scores(self, frames: Tensor) -> Tensor:
        """Absolute score of each location, [N, 1, h, w], of frames [N, H, W, 3]."""
        (features,) = self.backbone(frames)
        return self.location_scorer(features).abs()  # type: ignore[no-any-return]

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score uint8 frames [N, H, W, 3]; the map is the mean of both scales, the half one interpolated.

        The half scale takes every second pixel, which is the nearest-neighbour interpolation of the authors' code.
        """
        pixels = frames.float()  # before the slice: TensorRT can do nothing with uint8 but cast it
        full = self.location_scores(pixels)
        half = self.location_scores(pixels[:, ::2, ::2])
        score = (top_mean(full) + top_mean(half)) / 2.0
        location_map = ((full + upsample_to(half, full)) / 2.0).squeeze(1)
        return score, location_map, no_prototypes(location_map)


def top_mean(location_scores: Tensor) -> Tensor:
    """Mean of the K largest of n scores, K = max(int(0.1 n), 1): [N, 1, h, w] to [N]."""
    scores = location_scores.flatten(1)
    top_cells = max(int(TOP_SHARE * scores.shape[1]), 1)
    return scores.topk(top_cells, dim=1).values.mean(1)


def deviation_loss(scores: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
    """Deviation loss: mean of (1 - y) |dev| + y max(0, 5 - dev), dev = (s - mean r) / std r.

    Args:
        scores: s, [N].
        labels: y, 0 for normal and 1 for anomalous, [N].
        reference: r, scores drawn from the standard normal prior, [5000] in training.
    """
    deviation = (scores - reference.mean()) / reference.std()
    return torch.where(labels == 0, deviation.abs(), functional.relu(CONFIDENCE_MARGIN - deviation)).mean()


def focal_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Focal loss of Lin et al. (2017) with alpha = 1 and gamma = 2: mean of -(1 - p)^2 log p.

    p is the probability of the true label, with sigmoid(s) that of an anomaly; a score of 0 is its even odds.

    Args:
        scores: s, [N].
        labels: 0 for normal and 1 for anomalous, [N].
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
    return ((1.0 - torch.exp(-cross_entropy)).pow(FOCUSING) * cross_entropy).mean()


@register("devnet")
@dataclass(frozen=True, slots=True)
class DevNet(Detector):
    """Fine-tunes backbone and location scorer under the deviation loss.

    The defaults are ours, for a CPU; the authors' values are in brackets.

    Attributes:
        steps: Of training (1000); the last fifth at a tenth of the learning rate (tenfold less after each fifth).
        batch_per_class: Normal images, and as many anomalous ones, in a step (24).
        learning_rate: Of Adam at the beginning (2e-4).
    """

    steps: Annotated[int, Field(ge=1)] = 160
    batch_per_class: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3

    strides: ClassVar[tuple[int, ...]] = (STRIDE,)
    name: ClassVar[str] = "devnet"

    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Fit on normal images and at least one labelled anomaly; the backbone of the features stays as it is.

        Raises:
            UsageError: No labelled anomaly.
        """
        if not len(images.shots):
            msg = f"{self.name} learns from labelled defects and got none; use --shots 1 or --detector meliad"
            raise UsageError(msg)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = DevNetNetwork(copy.deepcopy(features.backbone), images.size_hw)
            loss = self._train(network, images, np.random.default_rng(seed))
        return FittedDetector(network.eval(), (), {"training_steps": self.steps, "final_loss": round(loss, 4)})

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> DevNetNetwork:
        """Rebuild a fitted network from its tensors, which include its backbone."""
        network = DevNetNetwork(copy.deepcopy(backbone), input_hw, **description)
        network.load_state_dict(state)
        return network

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Deviation loss with fresh reference scores."""
        return deviation_loss(scores, labels, torch.randn(REFERENCE_SCORES))

    def _train(self, network: DevNetNetwork, images: TrainingImages, rng: np.random.Generator) -> float:
        optimiser = torch.optim.Adam(network.parameters(), lr=self.learning_rate, weight_decay=_WEIGHT_DECAY)
        full_rate_steps = math.ceil(_FULL_RATE_SHARE * self.steps)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, full_rate_steps, gamma=0.1)
        labels = torch.tensor([0] * self.batch_per_class + [1] * self.batch_per_class)
        normal, shots = _rotated(images.normal, rng), _rotated(images.shots, rng)
        network.train()
        loss = torch.zeros(())
        with progress_bar() as bar:
            task = bar.add_task(f"{'fine-tuning':<24}", total=self.steps, note="")
            for _ in range(self.steps):
                batch = [next(frames) for frames in (normal, shots) for _ in range(self.batch_per_class)]
                scores, *_ = network(torch.from_numpy(np.stack(batch)))
                loss = self.loss(scores, labels)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(network.parameters(), _GRADIENT_NORM)
                optimiser.step()
                schedule.step()
                bar.update(task, advance=1, note=f"loss {loss.item():.3f}")
        return loss.item()


@register("flos")
@dataclass(frozen=True, slots=True)
class Flos(DevNet):
    """DevNet with the focal loss, the baseline that DevNet and DRA are compared with.

    The authors' code offers this loss for the same network with these constants; that their tables used it
    unchanged, absolute values included, is our reading [ours].
    """

    name: ClassVar[str] = "flos"

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Focal loss; the score is its logit."""
        return focal_loss(scores, labels)


def gradient_explanation(network: DevNetNetwork, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Which pixels the score hangs on: DevNet's published explanation, which a forward-only graph cannot give.

    The gradient of the score by the normalised image, absolute, summed over channels, scaled so that its minimum is 0
    and its 99th percentile 1, clipped, and smoothed with a Gaussian of 4 pixels (the authors' code).

    Args:
        network: In evaluation mode.
        frame: uint8 RGB [H, W, 3], at model size.

    Returns:
        float32 [H, W] in [0, 1]; zeros where the score has no gradient.
    """
    with torch.enable_grad():
        pixels = torch.from_numpy(frame).unsqueeze(0).float().requires_grad_()
        score, *_ = network(pixels)
        (by_pixel,) = torch.autograd.grad(score.sum(), pixels)
    scale: Tensor = network.backbone.scale  # type: ignore[assignment]
    magnitude = (by_pixel[0] / scale.flatten()).abs().sum(-1).numpy()
    low, high = magnitude.min(), np.percentile(magnitude, _EXPLANATION_PERCENTILE)
    if high <= low:
        return np.zeros_like(magnitude)
    clipped = np.clip((magnitude - low) / (high - low), 0.0, 1.0).astype(np.float32)
    width = 2 * round(4.0 * _EXPLANATION_SIGMA) + 1  # four sigmas to each side, as in SciPy, which the authors use
    smooth = cv2.GaussianBlur(clipped, (width, width), _EXPLANATION_SIGMA, borderType=cv2.BORDER_REFLECT)
    return np.asarray(smooth, dtype=np.float32)


def _rotated(frames: NDArray[np.uint8], rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """Frames without end, each turned by any angle, black outside; all come once before one comes again."""
    while True:
        for index in rng.permutation(len(frames)):
            yield rotate(frames[index], rng.uniform(-180.0, 180.0))


def rotate(frame: NDArray[np.uint8], degrees: float) -> NDArray[np.uint8]:
    """Turn a frame [H, W, 3] counter-clockwise about its centre, by nearest neighbour; black comes in."""
    height, width = frame.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2.0, (height - 1) / 2.0), degrees, 1.0)
    return np.asarray(cv2.warpAffine(frame, turn, (width, height), flags=cv2.INTER_NEAREST), dtype=np.uint8)
