"""Convolution weights that half precision holds exactly, so that FP16 has no weights to round."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

_LARGEST_HALF = 65504.0


def round_weights_to_half(network: nn.Module) -> None:
    """Round what every convolution multiplies with, and adds, to the nearest half-precision number, in place [ours].

    Where batch normalisation follows, the product of both is rounded: that is what an exporter makes of the pair.
    Rounding before anything is fitted or calibrated on the network costs nothing; rounding afterwards moves scores.
    Numbers beyond the range of half precision stay as they are.

    Args:
        network: In evaluation mode.
    """
    leaves = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d) or _is_leaf(module)]
    with torch.no_grad():
        for module, following in pairwise([*leaves, None]):
            if isinstance(module, nn.Conv2d):
                _round(module, following if isinstance(following, nn.BatchNorm2d) else None)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _round(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
    weight, bias = convolution.weight, convolution.bias
    if norm is None:
        weight.copy_(_nearest_half(weight))
        if bias is not None:
            bias.copy_(_nearest_half(bias))
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).double()
    by_output = factor.view(-1, *([1] * (weight.dim() - 1)))
    weight.copy_(torch.where(by_output == 0, weight, _nearest_half(weight * by_output) / by_output))
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    norm.bias.copy_(_nearest_half(norm.bias - mean * factor) + mean * factor)


def _nearest_half(values: Tensor) -> Tensor:
    return torch.where(values.abs() > _LARGEST_HALF, values, values.half().to(values.dtype))
