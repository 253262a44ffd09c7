"""The network of MeLIAD: what a frame goes through, and what the fit writes into it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import interpolation_matrix, pooled_levels
from meliad_edge.models.network import PrototypeNetwork
from meliad_edge.models.places import PlaceGaussians, place_deviation
from meliad_edge.models.scoring import ScoringParameters
from meliad_edge.models.whitening import Whitening

# An embedding: whitened directions, two numbers on the deviation from what is normal at a place, and zeros up to a
# multiple of 8. Vector units, here and on a GPU, like multiples of 8 and 16.
PLACE_NUMBERS = 8
# Where the deviation is in an embedding, and what the training made of it.
DEVIATION = -PLACE_NUMBERS
TRAINED = DEVIATION + 1
# What places say are two numbers of an embedding; so scaled, they do not count in distances to prototypes.
DEVIATION_SCALE = 0.01
# Length of an embedding after normalisation: its whitened length to the power 1 - LENGTH_DAMPING.
LENGTH_DAMPING = 0.75
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
        self.metric_fine = nn.Conv2d(fine, depth - PLACE_NUMBERS, 1)
        self.metric_coarse = nn.Conv2d(coarse, depth - PLACE_NUMBERS, 1, bias=False)
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
        zeros_behind = (0, 0, 0, 0, 0, PLACE_NUMBERS - 2)
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


def load_metric(network: MeliadNetwork, whitening: Whitening) -> None:
    """Split the whitening between the two feature levels; the constant goes to the fine one."""
    fine = network.metric_fine.in_channels
    matrix = torch.from_numpy(whitening.matrix)
    network.metric_fine.weight.data = matrix[:, :fine, None, None].contiguous()
    network.metric_coarse.weight.data = matrix[:, fine:, None, None].contiguous()
    network.metric_fine.bias.data = torch.from_numpy(-(whitening.matrix @ whitening.mean))  # type: ignore[union-attr]


def load_places(network: MeliadNetwork, places: PlaceGaussians, direction: NDArray[np.float32]) -> None:
    """Split the projection between the two feature levels; the direction [d] is that of deviations from places."""
    finer = network.place_finer.in_channels
    projection = torch.from_numpy(places.projection)[:, :, None, None]
    network.place_finer.weight.data = projection[:, :finer].expand(-1, -1, 2, 2) / 4.0
    network.place_fine.weight.data = projection[:, finer:].contiguous()
    network.place_mean.data = torch.from_numpy(places.mean).permute(2, 0, 1).contiguous()
    network.place_main.data = torch.from_numpy(places.main)
    network.place_precision.data = torch.from_numpy(places.precision)
    network.place_direction.data = DEVIATION_SCALE * torch.from_numpy(direction).unsqueeze(0)
