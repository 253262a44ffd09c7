"""The node in front of the exported graph: frames to images of even light, with its definition in standard operators.

As with the scoring node, a runtime that knows the fused kernel gives it the node, every other one executes the body.
Both follow ``kernels/reference``.
"""

from __future__ import annotations

from onnx import FunctionProto, NodeProto, helper, parser
from torch import Tensor

from meliad_edge.export.scoring_function import DOMAIN
from meliad_edge.models.backbone import EVEN_MEAN, EVEN_SPREAD, SMALLEST_SPREAD, Backbone

OPERATOR = "EvenLight"

# Cast before it is transposed, because TensorRT does nothing with uint8 but cast it.
# The offset is added to what was clipped, not clipped with it: one pass over the image less.
# uint8 [N, H, W, 3] frames -> float32 [N, 3, H, W] images. Shift and scale have one number per colour, or one for all.
_BODY = """
<domain: "meliad", opset_import: ["" : 18]>
EvenLight
<mean, spread, smallest_spread, shift, scale>
(frames) => (images)
{
    white = Constant<value_float: float = 255.0>()
    mean_c = Constant<value_float: float = @mean>()
    spread_c = Constant<value_float: float = @spread>()
    smallest_spread_c = Constant<value_float: float = @smallest_spread>()
    lowest = Neg(mean_c)
    highest = Sub(white, mean_c)
    axes_of_image = Constant<value_ints: ints = [1, 2, 3]>()
    axes_of_colour = Constant<value_ints: ints = [0, 2, 3]>()
    shift_1d = Constant<value_floats: floats = @shift>()
    scale_1d = Constant<value_floats: floats = @scale>()
    shift_4d = Unsqueeze(shift_1d, axes_of_colour)
    scale_4d = Unsqueeze(scale_1d, axes_of_colour)
    offset = Sub(mean_c, shift_4d)

    pixels_last = Cast<to: int = 1>(frames)
    pixels = Transpose<perm: ints = [0, 3, 1, 2]>(pixels_last)
    mean_of_image = ReduceMean<keepdims: int = 1>(pixels, axes_of_image)
    centred = Sub(pixels, mean_of_image)
    squared = Mul(centred, centred)
    variance = ReduceMean<keepdims: int = 1>(squared, axes_of_image)
    spread_of_image = Sqrt(variance)
    divisor = Add(spread_of_image, smallest_spread_c)
    stretch = Div(spread_c, divisor)
    stretched = Mul(centred, stretch)
    clipped = Clip(stretched, lowest, highest)
    shifted = Add(clipped, offset)
    images = Mul(shifted, scale_4d)
}
"""


def even_light_function() -> FunctionProto:
    """The function body of the node, opset 18."""
    return parser.parse_function(_BODY)


def even_light_node(frames: str, images: str, backbone: Backbone) -> NodeProto:
    """The node that calls the function.

    Args:
        frames: Name of its input.
        images: Name of its output.
        backbone: Gives its attributes.
    """
    shift: Tensor = backbone.shift  # type: ignore[assignment]
    scale: Tensor = backbone.scale  # type: ignore[assignment]
    return helper.make_node(
        OPERATOR,
        [frames],
        [images],
        name=OPERATOR,
        domain=DOMAIN,
        mean=EVEN_MEAN,
        spread=EVEN_SPREAD,
        smallest_spread=SMALLEST_SPREAD,
        shift=shift.flatten().tolist(),
        scale=scale.flatten().tolist(),
    )
