"""SSAE: an autoencoder that learns to take foreign things out of normal images (arXiv 2206.11723).

Bauer, Nakajima and Müller train it on partially corrupted images and score what it changes. The box-filtered squared
error is the paper's; masks, fillings and the dilated bottleneck are known to us second-hand; the weights of the
loss, the maximum as the score, and everything else are ours. Against the paper the network is small and its training
short, so that it fits into minutes on two CPU cores: a reconstruction at a fraction of the published effort, not the
published model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from meliad_edge.models.backbone import Backbone
from meliad_edge.models.corruption import corrupt
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import (
    Detector,
    DetectorNetwork,
    FittedDetector,
    TrainingImages,
    no_prototypes,
    register,
)
from meliad_edge.progress import progress_bar, track

MASKED_WEIGHT = 0.9
DILATIONS = (1, 2, 4, 8, 16)
STEM_STRIDE = 4
# Pixels per side of a cell of the map; the box filter spans an odd number of them.
CELL_PX = 8
# Smallest contrast of an image, as a variance: a hundredth of the range from black to white.
CONTRAST_FLOOR = 1e-4
# Share of the mean normal error that is added to every error, so that no cell of the map divides by nothing.
FLOOR_SHARE = 0.1
# Normal images that the typical error of each cell is estimated on.
_REFERENCE_IMAGES = 200
_BATCH = 16


class Autoencoder(nn.Module):
    """f: images to images of the same size, with a bottleneck of residual dilated 5x5 convolutions at stride 4 [ours].

    Args:
        width: Channels of the bottleneck.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(_convolution(3, width // 2, stride=2), _convolution(width // 2, width, stride=2))
        self.bottleneck = nn.ModuleList(_convolution(width, width, dilation=dilation) for dilation in DILATIONS)
        self.decoder = nn.Sequential(
            _convolution(width, width),
            nn.Conv2d(width, 3 * STEM_STRIDE**2, 3, padding=1),
            nn.PixelShuffle(STEM_STRIDE),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images [N, 3, H, W] in [0, 1]; H and W multiples of 4."""
        hidden = self.encoder(images)
        for layer in self.bottleneck:
            hidden = hidden + layer(hidden)
        reconstruction: Tensor = self.decoder(hidden)
        return reconstruction


def _convolution(channels_in: int, channels_out: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """5x5 convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 5, stride, 2 * dilation, dilation, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def reconstruction_loss(reconstruction: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    """(1-lambda)/|1-M| |(1-M)(f - x)|^2 + lambda/|M| |M (f - x)|^2 per image, then its mean [weights: ours].

    M counts once per channel in its 1-norms, so that each part is a mean over values.

    Args:
        reconstruction: f of the corrupted images, [N, 3, H, W].
        clean: x, [N, 3, H, W].
        mask: M, [N, 1, H, W] in [0, 1]; neither all 0 nor all 1 in any image.
    """
    error = reconstruction - clean
    return (
        (1.0 - MASKED_WEIGHT) * _weighted_mean_square(error, 1.0 - mask)
        + MASKED_WEIGHT * _weighted_mean_square(error, mask)
    ).mean()


def _weighted_mean_square(error: Tensor, weight: Tensor) -> Tensor:
    """|w e|^2 / |w|_1, [N]."""
    weight = weight.expand_as(error)
    return (weight * error).square().sum((1, 2, 3)) / weight.sum((1, 2, 3))


def box_cells(input_hw: tuple[int, int]) -> int:
    """Side of the box filter in cells of 8 px, odd: 3 for 128 px, 5 for 256 px, a sixth of the image [ours]."""
    return 2 * (min(input_hw) // 128) + 1


def box_filtered(error: Tensor, cells: int) -> Tensor:
    """Box filter of a pixel map, evaluated once per 8 px: means over squares of 8 * cells px around each cell.

    Where a square leaves the image, the mean is that of its part inside.

    Args:
        error: [N, H, W], H and W multiples of 8.
        cells: Side of the square in cells, odd.

    Returns:
        [N, H/8, W/8].
    """
    per_cell = functional.avg_pool2d(error.unsqueeze(1), CELL_PX)
    return functional.avg_pool2d(per_cell, cells, 1, cells // 2, count_include_pad=False).squeeze(1)


def local_contrast(images: Tensor, cells: int) -> Tensor:
    """Mean over boxes and channels of the variance of the pixels in a box [ours]: [N, C, H, W] to [N]."""
    planes = images.flatten(0, 1)
    variance = box_filtered(planes.square(), cells) - box_filtered(planes, cells).square()
    return variance.view(-1, images.shape[1], *variance.shape[1:]).mean((1, 2, 3))


class SSAENetwork(DetectorNetwork):
    """The autoencoder, and how large its error usually is in each cell of a normal image.

    The map is log((r + c) / (n + c)) [ours], with r the box-filtered error relative to the contrast of the image, n its
    mean over normal training images and c a tenth of the mean of n: 0 is as usual, and ln 2 twice that. The score is
    the maximum of the map. Without the contrast, an image with more texture than others would look defective.
    """

    typical_error: Tensor

    def __init__(self, input_hw: tuple[int, int], width: int) -> None:
        super().__init__(input_hw)
        self.autoencoder = Autoencoder(width)
        self.width = width
        self.register_buffer("typical_error", torch.ones(self.grid_hw))

    @property
    def grid_hw(self) -> tuple[int, int]:
        """One cell per 8 x 8 px."""
        return self.input_hw[0] // CELL_PX, self.input_hw[1] // CELL_PX

    @property
    def top_cells(self) -> int:
        """The score is the maximum of the map."""
        return 1

    def describe(self) -> dict[str, Any]:
        """The width of the autoencoder."""
        return {"width": self.width}

    def relative_error(self, frames: Tensor) -> Tensor:
        """Box-filtered channel mean of (x - f(x))^2 over the contrast of x, for uint8 frames: [N, H/8, W/8]."""
        images = frames.permute(0, 3, 1, 2).float() / 255.0
        error = (images - self.autoencoder(images)).square().mean(1)
        cells = box_cells(self.input_hw)
        return box_filtered(error, cells) / (local_contrast(images, cells) + CONTRAST_FLOOR).view(-1, 1, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score uint8 frames [N, H, W, 3]."""
        typical = self.typical_error
        floor = FLOOR_SHARE * typical.mean() + 1e-8
        evidence = torch.log((self.relative_error(frames) + floor) / (typical + floor))
        return evidence.flatten(1).amax(1), evidence, no_prototypes(evidence)


@register("ssae")
@dataclass(frozen=True, slots=True)
class SSAE(Detector):
    """Trains the autoencoder on corrupted normal images; labelled anomalies are not used.

    Attributes:
        steps: Of training.
        width: Channels of the bottleneck, even.
        batch_size: Images per step.
        learning_rate: The highest one, of AdamW under a one-cycle schedule.
    """

    steps: Annotated[int, Field(ge=1)] = 600
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-3

    strides: ClassVar[tuple[int, ...]] = ()

    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Train on the normal images; neither the shots nor the features of the backbone are read."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = SSAENetwork(images.size_hw, self.width)
            loss = self._train(network.autoencoder, images.normal, np.random.default_rng(seed))
        network.eval()
        network.typical_error.copy_(_typical_error(network, images.normal, seed))
        facts = {"training_steps": self.steps, "final_loss": round(loss, 5), "labelled_defects_used": 0}
        return FittedDetector(network, (), facts)

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> SSAENetwork:
        """Rebuild a fitted network from its tensors; the backbone is not used."""
        network = SSAENetwork(input_hw, int(description["width"]))
        network.load_state_dict(state)
        return network

    def _train(self, autoencoder: Autoencoder, normal: NDArray[np.uint8], rng: np.random.Generator) -> float:
        autoencoder.train().to(memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(autoencoder.parameters(), weight_decay=1e-4)
        # OneCycleLR divides by zero where the warm-up is a single step, so ten steps and fewer have none.
        warm_up = 0.1 if self.steps > 10 else 0.0
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.learning_rate, self.steps, pct_start=warm_up)
        recent_loss = 0.0
        with progress_bar() as bar:
            task = bar.add_task(f"{'training':<24}", total=self.steps, note="")
            for step in range(self.steps):
                corrupted, clean, mask = self._batch(normal, rng)
                loss = reconstruction_loss(autoencoder(corrupted), clean, mask)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                recent_loss += (loss.item() - recent_loss) / min(step + 1, 50)
                bar.update(task, advance=1, note=f"loss {recent_loss:.4f}")
        autoencoder.to(memory_format=torch.contiguous_format)
        return recent_loss

    def _batch(self, normal: NDArray[np.uint8], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Corrupted and clean images [N, 3, H, W] and masks [N, 1, H, W]."""
        chosen, donors = rng.integers(len(normal), size=(2, self.batch_size))
        samples = [corrupt(normal[image], normal[donor], rng) for image, donor in zip(chosen, donors, strict=True)]
        corrupted = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
        clean = torch.from_numpy(normal[chosen]).permute(0, 3, 1, 2).float() / 255.0
        mask = torch.from_numpy(np.stack([sample.mask for sample in samples])).unsqueeze(1)
        return corrupted, clean, mask


def _typical_error(network: SSAENetwork, normal: NDArray[np.uint8], seed: int) -> Tensor:
    """Mean of the relative error over some normal images, [h, w]."""
    chosen = np.random.default_rng(seed).permutation(len(normal))[:_REFERENCE_IMAGES]
    total = torch.zeros(network.grid_hw)
    with torch.inference_mode():
        for start in track(range(0, len(chosen), _BATCH), "typical errors"):
            total += network.relative_error(torch.from_numpy(normal[chosen[start : start + _BATCH]])).sum(0)
    return total / len(chosen)
