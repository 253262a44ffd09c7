"""Weights on the grid of 8 bits that change the results of a convolution least, rather than each weight least.

Rounding each weight to the nearest value adds errors that are the same for every pixel and do not average out. GPTQ
(Frantar et al., 2022, arXiv 2210.17323) rounds one weight after the other and lets those that are left take back what
each one changed, as far as the inputs of the layer are correlated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from meliad_edge.progress import track

_LARGEST = 127
# Added to the diagonal of the moments, as a share of its mean, so that rare inputs are not fitted to the last digit.
_DAMPING = 0.01


def round_weights(model: ModelProto, frames: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Weights of all convolutions, rounded to 8 bits with a scale per output channel.

    Args:
        model: FP32 graph; not changed.
        frames: What the inputs of the layers are measured on, uint8 RGB [n, H, W, 3].

    Returns:
        By the name of the constant, in its shape: whole multiples, -127 to 127, of a 127th of the largest weight of
        the output channel, which itself stays as it is.
    """
    constants = {initializer.name: numpy_helper.to_array(initializer) for initializer in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in constants]
    moments = _input_moments(model, convolutions, constants, frames)
    return {name: _round(constants[name], moments[name]) for name in moments}


def _input_moments(
    model: ModelProto,
    convolutions: list[NodeProto],
    constants: Mapping[str, NDArray[np.float32]],
    frames: NDArray[np.uint8],
) -> dict[str, Tensor]:
    """Sums of products of what the weights of a group are multiplied with, by weight: float64 [groups, K, K]."""
    names = list(dict.fromkeys(node.input[0] for node in convolutions))
    observed = ModelProto()
    observed.CopyFrom(model)
    observed.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(observed.SerializeToString(), providers=["CPUExecutionProvider"])
    moments: dict[str, Tensor] = {}
    for frame in track(list(frames), "rounding int8"):
        values = dict(zip(names, session.run(names, {"frames": frame[np.newaxis]}), strict=True))
        for node in convolutions:
            weight = constants[node.input[1]]
            columns = _columns(torch.from_numpy(values[node.input[0]]), weight.shape, node)
            product = (columns @ columns.transpose(1, 2)).double()
            moments[node.input[1]] = moments.get(node.input[1], torch.zeros(())) + product
    return moments


def _columns(inputs: Tensor, weight_shape: tuple[int, ...], node: NodeProto) -> Tensor:
    """What each group of a convolution's weights is multiplied with, [groups, K, output pixels]."""
    attributes: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    patches = functional.unfold(
        functional.pad(inputs, (left, right, top, bottom)),
        weight_shape[2:],
        dilation=attributes.get("dilations", 1),
        stride=attributes.get("strides", 1),
    )
    groups = attributes.get("group", 1)
    return patches[0].reshape(groups, patches.shape[1] // groups, -1)


def _round(weight: NDArray[np.float32], moments: Tensor) -> NDArray[np.float32]:
    """GPTQ of all groups at once, the weights with the largest inputs first.

    Args:
        weight: [outputs, ...].
        moments: [groups, K, K].
    """
    groups, count, _ = moments.shape
    left = torch.from_numpy(weight.copy()).double().reshape(groups, -1, count)
    largest = left.abs().amax(2, keepdim=True)
    step = torch.where(largest > 0, largest / _LARGEST, 1.0)[..., 0]
    power = moments.diagonal(dim1=1, dim2=2)
    # A group that only ever saw zeros is rounded to the nearest.
    ridge = (_DAMPING * power.mean(1, keepdim=True)).clamp_min(1e-12).expand_as(power)
    order = torch.argsort(power, dim=1, descending=True, stable=True)
    left = left.gather(2, order[:, None].expand_as(left))
    pinned = left.abs() == largest
    moments = moments + torch.diag_embed(ridge)
    moments = moments.gather(1, order[:, :, None].expand_as(moments)).gather(2, order[:, None].expand_as(moments))
    pull = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    original, rounded = left.clone(), torch.zeros_like(left)
    for k in range(count):
        nearest = (left[..., k] / step).round().clamp(-_LARGEST, _LARGEST) * step
        rounded[..., k] = torch.where(pinned[..., k], original[..., k], nearest)
        error = (left[..., k] - rounded[..., k]) / pull[:, None, k, k]
        left[..., k:] -= error[..., None] * pull[:, None, k, k:]
    back = torch.argsort(order, dim=1)
    return rounded.gather(2, back[:, None].expand_as(rounded)).reshape(weight.shape).float().numpy()
