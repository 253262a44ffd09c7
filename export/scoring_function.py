"""The scoring node of the exported graph, with its definition in standard ONNX operators.

The function body travels inside the model. A runtime that knows the fused kernel gives it the node; every
other runtime executes the body. Both follow ``kernels/reference``.
"""

from __future__ import annotations

from dataclasses import asdict

import onnx
from onnx import FunctionProto, NodeProto, helper, parser

from meliad_edge.models.scoring import ScoringParameters

DOMAIN = "meliad"
DOMAIN_VERSION = 1
OPERATOR = "PatchEntropyScore"

# The direction is multiplied as a column: ONNX Runtime 1.31 fuses the transposition above into a product with a
# vector and then computes wrong values.
# The sum of all cells times zero makes a score NaN when any cell is: TopK alone would leave such a cell out.
# [N, D, H, W] embeddings, [K, D] prototypes, [D] direction -> [N] score, [N, H, W] map, [N, 2, H, W] nearest.
_BODY = """
<domain: "meliad", opset_import: ["" : 18]>
PatchEntropyScore
<n_normal, top_cells, softness, normal_scale, anomaly_scale, bias, kappa, offset>
(embeddings, prototypes, direction) => (score, evidence_map, nearest)
{
    zero = Constant<value_float: float = 0.0>()
    one = Constant<value_float: float = 1.0>()
    minus_two = Constant<value_float: float = -2.0>()
    inverse_ln2 = Constant<value_float: float = 1.4426950408889634>()
    axis_last = Constant<value_ints: ints = [-1]>()
    axis_0 = Constant<value_ints: ints = [0]>()
    axis_1 = Constant<value_ints: ints = [1]>()
    end = Constant<value_ints: ints = [9223372036854775807]>()
    n_normal_0d = Constant<value_int: int = @n_normal>()
    n_normal_1d = Unsqueeze(n_normal_0d, axis_0)
    top_cells_0d = Constant<value_int: int = @top_cells>()
    top_cells_1d = Unsqueeze(top_cells_0d, axis_0)
    softness_c = Constant<value_float: float = @softness>()
    normal_scale_c = Constant<value_float: float = @normal_scale>()
    anomaly_scale_c = Constant<value_float: float = @anomaly_scale>()
    bias_c = Constant<value_float: float = @bias>()
    kappa_c = Constant<value_float: float = @kappa>()
    offset_c = Constant<value_float: float = @offset>()

    shape = Shape(embeddings)
    batch = Slice(shape, axis_0, axis_1, axis_0)
    two = Constant<value_ints: ints = [2]>()
    grid = Slice(shape, two, end, axis_0)
    flat_shape = Constant<value_ints: ints = [0, 0, -1]>()
    channels_first = Reshape(embeddings, flat_shape)
    cells = Transpose<perm: ints = [0, 2, 1]>(channels_first)

    cells_norm = ReduceSumSquare<keepdims: int = 1>(cells, axis_last)
    prototypes_norm = ReduceSumSquare<keepdims: int = 0>(prototypes, axis_last)
    prototypes_t = Transpose<perm: ints = [1, 0]>(prototypes)
    products = MatMul(cells, prototypes_t)
    products_2 = Mul(products, minus_two)
    norms = Add(cells_norm, prototypes_norm)
    squared = Add(norms, products_2)
    squared_0 = Max(squared, zero)
    distances = Sqrt(squared_0)
    d_normal = Slice(distances, axis_0, n_normal_1d, axis_last)
    d_anomaly = Slice(distances, n_normal_1d, end, axis_last)

    scaled_normal = Div(d_normal, softness_c)
    logits_normal = Neg(scaled_normal)
    lse_normal = ReduceLogSumExp<keepdims: int = 0>(logits_normal, axis_last)
    soft_normal_negative = Mul(lse_normal, softness_c)
    energy_normal = Mul(soft_normal_negative, normal_scale_c)
    scaled_anomaly = Div(d_anomaly, softness_c)
    logits_anomaly = Neg(scaled_anomaly)
    lse_anomaly = ReduceLogSumExp<keepdims: int = 0>(logits_anomaly, axis_last)
    soft_anomaly_negative = Mul(lse_anomaly, softness_c)
    distance_energy = Mul(soft_anomaly_negative, anomaly_scale_c)
    direction_column = Unsqueeze(direction, axis_1)
    projection_column = MatMul(cells, direction_column)
    projection = Squeeze(projection_column, axis_last)
    energy_projected = Add(distance_energy, projection)
    energy_anomaly = Add(energy_projected, bias_c)

    log_odds = Sub(energy_anomaly, energy_normal)
    probability = Sigmoid(log_odds)
    softplus = Softplus(log_odds)
    weighted = Mul(log_odds, probability)
    entropy_nats = Sub(softplus, weighted)
    entropy_bits = Mul(entropy_nats, inverse_ln2)
    damping = Mul(entropy_bits, kappa_c)
    confidence = Sub(one, damping)
    evidence = Mul(confidence, log_odds)

    top, top_index = TopK<axis: int = -1, largest: int = 1, sorted: int = 1>(evidence, top_cells_1d)
    top_mean = ReduceMean<keepdims: int = 0>(top, axis_last)
    sum_of_cells = ReduceSum<keepdims: int = 0>(evidence, axis_last)
    nan_if_any = Mul(sum_of_cells, zero)
    top_mean_or_nan = Add(top_mean, nan_if_any)
    score = Add(top_mean_or_nan, offset_c)
    map_shape = Concat<axis: int = 0>(batch, grid)
    evidence_map = Reshape(evidence, map_shape)

    index_normal = ArgMin<axis: int = -1, keepdims: int = 0>(d_normal)
    index_anomaly_0 = ArgMin<axis: int = -1, keepdims: int = 0>(d_anomaly)
    index_anomaly = Add(index_anomaly_0, n_normal_0d)
    index_normal_1 = Unsqueeze(index_normal, axis_1)
    index_anomaly_1 = Unsqueeze(index_anomaly, axis_1)
    indices = Concat<axis: int = 1>(index_normal_1, index_anomaly_1)
    nearest_shape = Concat<axis: int = 0>(batch, two, grid)
    nearest = Reshape(indices, nearest_shape)
}
"""


def scoring_function() -> FunctionProto:
    """The function body of the scoring node, opset 18."""
    return parser.parse_function(_BODY)


def scoring_node(
    inputs: tuple[str, str, str], outputs: tuple[str, str, str], parameters: ScoringParameters
) -> NodeProto:
    """The node that calls the function.

    Args:
        inputs: Names of embeddings, prototypes and direction.
        outputs: Names of score, map and nearest.
        parameters: Become its attributes, under the same names.
    """
    return helper.make_node(OPERATOR, inputs, outputs, name=OPERATOR, domain=DOMAIN, **asdict(parameters))


def scoring_opset() -> onnx.OperatorSetIdProto:
    """The entry of the domain in a model's list of operator sets."""
    return helper.make_opsetid(DOMAIN, DOMAIN_VERSION)
