"""Weights that half precision holds: the folded product of convolution and norm, and nothing but a rounding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from meliad_edge.models.backbone import load_backbone
from meliad_edge.models.half_weights import round_weights_to_half

pytestmark = pytest.mark.workshop


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """What an exporter makes of the pair, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = torch.zeros_like(norm.bias) if convolution.bias is None else convolution.bias
    return (
        convolution.weight.double() * factor.view(-1, 1, 1, 1),
        norm.bias.double() + (bias.double() - norm.running_mean.double()) * factor,
    )


def random_pair(seed: int, *, bias: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean = torch.randn(6)
    norm.running_var = torch.rand(6) + 0.1
    return nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias), norm, nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_of_convolution_and_norm_is_in_half(bias: bool) -> None:
    network = random_pair(1, bias=bias)
    before = folded(network[0], network[1])
    last = network[3].weight.detach().clone()
    round_weights_to_half(network)
    for value, original in zip(folded(network[0], network[1]), before, strict=True):
        nearest = original.half().double()
        torch.testing.assert_close(value, nearest, rtol=1e-6, atol=1e-6)
        assert not torch.equal(nearest, original)
    assert torch.equal(network[3].weight, last.half().float())


def test_rounding_twice_changes_nothing_more() -> None:
    network = random_pair(2, bias=True)
    round_weights_to_half(network)
    frames = torch.randn(2, 4, 9, 9)
    once = network(frames)
    round_weights_to_half(network)
    torch.testing.assert_close(network(frames), once, rtol=1e-6, atol=1e-6)


def test_numbers_beyond_half_stay() -> None:
    layer = nn.Conv2d(1, 1, 1)
    nn.init.constant_(layer.weight, 1e6)
    round_weights_to_half(layer)
    assert layer.weight.item() == 1e6


def test_a_norm_without_weight_keeps_the_convolution() -> None:
    network = random_pair(3, bias=False)
    with torch.no_grad():
        network[1].weight[2] = 0.0
    kept = network[0].weight[2].detach().clone()
    round_weights_to_half(network)
    assert torch.equal(network[0].weight[2], kept)
    assert torch.isfinite(network(torch.randn(1, 4, 5, 5))).all()


def test_every_layer_of_the_default_backbone_is_in_half() -> None:
    leaves = [m for m in load_backbone().modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    pairs = [(a, b) for a, b in pairwise(leaves) if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d)]
    assert 2 * len(pairs) == len(leaves)
    for convolution, norm in pairs:
        for value in folded(convolution, norm):
            np.testing.assert_allclose(value.half().double().detach(), value.detach(), rtol=2e-6, atol=2e-6)
